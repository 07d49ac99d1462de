"""What goes wrong anywhere, as the page says it: its controls, none of the program's options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from tests.fakes import ScriptedBackend, picture
from vlmchat import errors
from vlmchat.client import _error
from vlmchat.config import ImagePolicy, sampling_params
from vlmchat.errors import (
    ConfigError,
    DownloadFailed,
    EngineDead,
    ImageRejected,
    InvalidRequest,
    OutOfMemory,
    PromptTooLong,
    VlmchatError,
)
from vlmchat.images import ImageLoader
from vlmchat.request import SamplingParams
from vlmchat.server.openai import overflow
from vlmchat.server.pictures import Pictures, Source
from vlmchat.session import ChatSession
from vlmchat.web.words import told

# Options, commands of the terminal, parameters of a wire, addresses.
NOT_FOR_PEOPLE = re.compile(r"(^|\s)--?[a-z]|(^|\s)/[a-z]|[a-z]_[a-z]|truncation|https?:|install")
SMALL = ImagePolicy(max_bytes=2000, max_pixels=10, allow_local_files=False)
SERVER = "http://10.0.0.7:21001/v1"


def _wire(error: PromptTooLong) -> VlmchatError:
    """As a client of a server gets it back."""
    body = {"error": {"message": error.message, "code": error.code}}
    return _error(400, body, SERVER)


def _room() -> None:
    ChatSession(ScriptedBackend(context_length=64), SamplingParams(max_new_tokens=64))


def _answered(status: int, message: str) -> Callable[[], None]:
    def fail() -> None:
        raise _error(status, {"error": {"message": message}}, SERVER)

    return fail


def _raised(error: VlmchatError) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


LOWER = "shorten it, or lower Longest answer under Parameters"
GONE = "the model m went away, or its server failed; try again once it is back"
KEY = "the server does not take this page's key; whoever runs the page must change it"
CASES: list[tuple[Callable[[], object], str]] = [
    (
        _raised(PromptTooLong(700, 500)),
        f"the question needs 700 tokens, there is room for 500; {LOWER}",
    ),
    (
        _raised(PromptTooLong(700, 500, 600)),
        "the question needs 700 tokens (600 of them pictures), there is room for 500; "
        "shorten it, use fewer pictures, or lower Longest answer under Parameters",
    ),
    (
        _raised(_wire(overflow(PromptTooLong(5000, 3584), 4096))),
        f"the question is too long for this model; {LOWER}",
    ),
    (
        lambda: sampling_params(seed=2**63),
        "Seed is 9223372036854775808; it must be between 0 and 2^63 - 1",
    ),
    (
        lambda: sampling_params(temperature=-1),
        "Temperature is -1; it must be between 0 and 100",
    ),
    (lambda: sampling_params(top_p=2), "Top-p is 2; it must be above 0 and at most 1"),
    (
        _room,
        "Longest answer 64 leaves no room for a question in a context of 64 tokens; lower it",
    ),
    (_answered(400, "max_tokens is 9; 4 is the most"), "Longest answer is 9; 4 is the most"),
    (_answered(400, "top_p is 9"), "Top-p is 9"),
    (_answered(401, "no such key"), KEY),
    (_answered(404, "no such model"), GONE),
    (
        _answered(429, "12 requests with about 9 prompt tokens wait already"),
        "the server is busy; try again in a moment",
    ),
    (_answered(500, "http://10.0.0.7:21002: silent"), GONE),
    (
        lambda: ImageLoader(SMALL).load_bytes(picture().data, "a--b.png"),
        "a--b.png is 8x6 pixels (4.8e-05 MP), the limit is 1e-05 MP; resize it",
    ),
    (
        lambda: ImageLoader(SMALL).load_bytes(bytes(5000), "p.png"),
        "p.png has 4.883 KiB, the limit is 1.953 KiB",
    ),
    (
        _raised(ImageRejected("p.heic is a HEIC picture; to read it, install pillow-heif")),
        "p.heic is a HEIC picture",
    ),
    (
        lambda: Pictures(SMALL, 1).fetch(Source("http://127.0.0.1:9/p.png", "the picture")),
        "pictures are fetched from public addresses only; save this one and add its file",
    ),
    (
        _raised(DownloadFailed("the picture: not received within 9 s; raise --image-timeout")),
        "the picture: not received within 9 s",
    ),
    (
        _raised(OutOfMemory("1 GB is needed; lower --context-length, or use --load-4bit")),
        "there was not enough memory for this; use fewer or smaller pictures, "
        "or a shorter question",
    ),
    (
        _raised(EngineDead("the engine failed: (1, 2); restart vlmchat")),
        "the model has stopped; whoever runs this page must start it again",
    ),
    (_raised(InvalidRequest("there is no question; /clear begins anew")), "there is no question"),
    (_raised(ConfigError("two models; name one with --model-path")), "two models"),
]


@pytest.mark.parametrize(("fail", "words"), CASES, ids=[words[:40] for _, words in CASES])
def test_told_speaks_the_page_s_words(fail: Callable[[], object], words: str) -> None:
    with pytest.raises(VlmchatError) as caught:
        fail()
    assert told(caught.value, "m") == words
    assert not NOT_FOR_PEOPLE.search(words)


def _kinds(root: type[VlmchatError] = VlmchatError) -> Iterator[type[VlmchatError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _kinds(kind)


@pytest.mark.parametrize("advice", ["lower --context-length", "see /clear", "try --load-4bit"])
@pytest.mark.parametrize("kind", [k for k in _kinds() if k is not errors.PromptTooLong])
def test_told_names_no_option_whatever_the_error_is(kind: type[VlmchatError], advice: str) -> None:
    assert not NOT_FOR_PEOPLE.search(told(kind(f"it is too much; {advice}"), "m"))
