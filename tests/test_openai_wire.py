"""Bodies of OpenAI's chat completions: what is read, what is refused by name, what is written."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest
from PIL import Image as PILImage

from tests.fakes import picture
from vlmchat.config import ImagePolicy
from vlmchat.conversation import Conversation, Image
from vlmchat.errors import InvalidRequest
from vlmchat.images import ImageLoader
from vlmchat.openai_wire import data_url, read_conversation, read_params, write_body
from vlmchat.request import Grammar, SamplingParams

RED = picture()


def _load(url: str) -> Image:
    assert url == "red.png"
    return RED


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    "part",
    [
        pytest.param({"type": "image_url", "image_url": {"url": "red.png"}}, id="object"),
        pytest.param({"type": "image_url", "image_url": "red.png"}, id="bare text"),
        pytest.param({"type": "input_image", "image_url": "red.png"}, id="responses"),
    ],
)
def test_conversation_is_read_with_turns_and_pictures(part: dict[str, Any]) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        _user([{"type": "text", "text": "what"}, part, {"type": "text", "text": "is it"}]),
        {"role": "assistant", "content": "red"},
        _user("sure?"),
    ]
    expected = Conversation("Be brief.").ask("what\nis it", (RED,)).answered("red").ask("sure?")
    assert read_conversation(messages, _load) == expected


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        pytest.param([], "at least one message", id="none"),
        pytest.param("hi", "must be a list", id="text"),
        pytest.param([_user("a"), _user("b")], r"messages\[1\] follows another user", id="two"),
        pytest.param([{"role": "tool", "content": "x"}], "role 'tool'", id="role"),
        pytest.param([{"role": "assistant", "content": "x"}], "must follow a user", id="answer"),
        pytest.param([_user("a"), {"role": "system", "content": "x"}], "come first", id="late"),
        pytest.param([_user(None)], "content must be a text or a list", id="null"),
        pytest.param([_user([{"type": "input_audio"}])], "neither a text nor", id="audio"),
        pytest.param([_user([{"type": "image_url", "image_url": 3}])], "holds no url", id="url"),
        pytest.param(
            [_user("a"), {"role": "assistant", "content": "b"}], "last message", id="answered"
        ),
    ],
)
def test_conversation_that_cannot_be_is_refused_by_name(messages: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_conversation(messages, _load)


def test_params_are_read_over_the_defaults() -> None:
    body = {
        **{"temperature": 0, "max_completion_tokens": 7, "stop": "x", "logprobs": True},
        **{"top_logprobs": 2, "logit_bias": {"5": -1}, "seed": 3, "user": "me", "n": 1},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    }
    assert read_params(body, SamplingParams(top_p=0.5)) == SamplingParams(
        temperature=0,
        max_new_tokens=7,
        stop=("x",),
        logprobs=2,
        top_p=0.5,
        logit_bias=((5, -1.0),),
        seed=3,
        grammar=Grammar("json_schema", '{"type": "object"}'),
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"temprature": 1}, "'temprature' is not served"),
        ({"tools": []}, "'tools' is not served"),
        ({"n": 2}, "n is 2"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 200}, "temperature is 200; it must be between 0 and 100"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be a whole number"),
        ({"max_tokens": 0}, "max_new_tokens is 0"),
        ({"frequency_penalty": 9}, "frequency_penalty is 9; it must be between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be between 0.01 and 100"),
        ({"stop": 3}, "stop must be a text"),
        ({"logit_bias": {"a": 1}}, "logit_bias must map"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it must be true or false"),
        ({"response_format": {"type": "xml"}}, "response_format must be"),
    ],
)
def test_params_that_are_wrong_are_refused_by_name(body: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_params(body, SamplingParams())


def test_body_reads_back_as_what_was_written() -> None:
    asked = Conversation("s").ask("a", (RED,)).answered("b").ask("c")
    params = SamplingParams(
        temperature=0.5,
        top_k=3,
        stop=("x",),
        seed=1,
        logprobs=2,
        frequency_penalty=0.5,
        logit_bias=((5, -1.0),),
        grammar=Grammar("json_object", ""),
    )
    body = write_body(asked, params, "m")
    assert read_conversation(body.pop("messages"), ImageLoader(ImagePolicy()).load) == asked
    assert read_params(body, SamplingParams()) == params


def test_body_names_only_what_every_server_knows_where_nothing_else_is_asked() -> None:
    body = write_body(Conversation().ask("a"), SamplingParams(), "m")
    assert body.keys() == {
        *("model", "messages", "temperature", "top_p", "max_tokens", "stream", "stream_options")
    }


def test_picture_goes_out_as_its_file_where_every_server_sees_the_same_in_it() -> None:
    sent = ImageLoader(ImagePolicy()).load(data_url(RED))
    assert sent.data == RED.data


@pytest.mark.parametrize("kind", ["turned", "alpha", "webp"])
def test_picture_goes_out_as_png_where_servers_might_see_it_otherwise(kind: str) -> None:
    file, exif = BytesIO(), PILImage.Exif()
    exif[0x0112] = 6  # a phone held upright
    pixels = PILImage.linear_gradient("L").resize((30, 20)).convert("RGB")
    if kind == "alpha":
        pixels.putalpha(128)
    options: dict[str, Any] = {"exif": exif} if kind == "turned" else {}
    pixels.save(file, "WEBP" if kind == "webp" else "PNG", lossless=True, **options)
    image = ImageLoader(ImagePolicy()).load_bytes(file.getvalue(), "x")
    url = data_url(image)
    assert url.startswith("data:image/png;base64,")
    sent = ImageLoader(ImagePolicy()).load(url)
    assert sent == image
    assert sent.data != image.data
