"""Many requests at once: what is read, what is answered, what a failure costs, how a run ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import ScriptedBackend, ScriptedStream, picture
from vlmchat import batch
from vlmchat.batch import (
    Batch,
    Preparer,
    Request,
    Tally,
    expand,
    picture_requests,
    read_requests,
    survey,
    unique,
)
from vlmchat.config import ImagePolicy
from vlmchat.conversation import Conversation
from vlmchat.errors import (
    EngineDead,
    ImageNotFound,
    InvalidRequest,
    NetworkError,
    OutOfMemory,
)
from vlmchat.images import ImageLoader
from vlmchat.request import SamplingParams

Line = dict[str, Any]
PARAMS = SamplingParams(temperature=0, max_new_tokens=50)


class Lines:
    """Answers in a list. Fails once it holds `room` of them."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.lines: list[Line] = []
        self.room = room

    def write(self, line: Line) -> None:
        if len(self.lines) == self.room:
            raise OSError(5, "Input/output error")
        self.lines.append(line)


class Busy(ScriptedBackend):
    """Counts how many ask at once; fails what `failing` says, with the question."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asking = self.most = 0
        self.failing: Callable[[str], Exception | None] = lambda question: None
        self._counting = threading.Lock()

    def stream(self, conversation: Conversation, params: SamplingParams) -> ScriptedStream:
        question = conversation.pending.text if conversation.pending else ""
        if error := self.failing(question):
            raise error
        with self._counting:
            self.asking += 1
            self.most = max(self.most, self.asking)
        time.sleep(0.01)
        stream = super().stream(conversation, params)
        with self._counting:
            self.asking -= 1
        return stream


def _prepare(folder: Path | None = None) -> Preparer:
    return Preparer(ImageLoader(ImagePolicy()), PARAMS, "Be brief.", folder)


def _simple(count: int) -> list[Request]:
    return [Request(str(n), "simple", {"prompt": f"q{n}"}) for n in range(count)]


def _run(
    requests: Iterable[Request],
    backend: ScriptedBackend | None = None,
    folder: Path | None = None,
    concurrency: int = 2,
) -> list[Line]:
    answers = Lines()
    Batch(backend or ScriptedBackend(), _prepare(folder), answers, concurrency).run(requests)
    return answers.lines


def _read(*lines: Any) -> list[Request]:
    return list(read_requests(json.dumps(line).encode() + b"\n" for line in lines))


@pytest.fixture(autouse=True)
def _short_pauses_and_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmchat.batch._DECODERS", 1)
    monkeypatch.setattr("vlmchat.batch._PAUSES_S", (0.01, 0.01))


def test_batch_answers_a_simple_request_as_chat_does_in_json(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(picture().data)
    backend = ScriptedBackend()
    request = {"id": 7, "image": "red.png", "prompt": "what is it", "temperature": 0.5}
    (line,) = _run(_read(request), backend, tmp_path)
    assert (line["schema"], line["type"], line["id"]) == (1, "answer", "7")
    assert (line["answer"], line["finish_reason"]) == ("You said: what is it", "stop")
    assert line["usage"]["image_tokens"] == 16
    assert line["images"][0]["source"] == "red.png"
    assert backend.params[0].temperature == 0.5
    assert backend.seen[0].system == "Be brief."


def test_batch_answers_openais_line_in_openais_form(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(picture().data)
    parts = [{"type": "image_url", "image_url": {"url": "red.png"}}, {"type": "text", "text": "hi"}]
    body = {"model": "any", "messages": [{"role": "user", "content": parts}], "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (answer,) = _run(_read(line), folder=tmp_path)
    assert answer.keys() == {"id", "custom_id", "response", "error"}
    assert (answer["custom_id"], answer["error"]) == ("a", None)
    assert answer["response"]["status_code"] == 200
    completion = answer["response"]["body"]
    assert completion["object"] == "chat.completion"
    assert completion["choices"][0]["message"]["content"] == "You said:"
    assert completion["choices"][0]["finish_reason"] == "length"
    assert completion["usage"]["total_tokens"] == completion["usage"]["prompt_tokens"] + 2


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        pytest.param({"prompt": "x", "image": "no.png"}, "image_not_found", "no.png", id="picture"),
        pytest.param({"prompt": "x", "image": "-"}, "image_not_found", "no such", id="stdin"),
        pytest.param({"prompt": "x", "images": "a"}, "invalid_request", "a list", id="images"),
        pytest.param({"prompt": ""}, "invalid_request", "not empty", id="prompt"),
        pytest.param({"prompt": "x", "temprature": 1}, "invalid_request", "temprature", id="key"),
        pytest.param({"prompt": "x " * 600}, "context_length_exceeded", "607", id="long"),
        pytest.param({"id": "", "prompt": "x"}, "invalid_request", "line 1: id must", id="id"),
        pytest.param([1], "invalid_request", "line 1 is not a JSON object", id="list"),
    ],
)
def test_batch_makes_one_line_of_what_is_wrong_with_a_request(
    tmp_path: Path, line: Any, code: str, words: str
) -> None:
    lines = _run(_read(line, {"prompt": "hi"}), folder=tmp_path, concurrency=1)
    answered, failed = sorted(lines, key=lambda line: str(line["type"]))
    assert (failed["type"], failed["error"]["code"]) == ("error", code)
    assert words in failed["error"]["message"]
    assert answered["answer"] == "You said: hi"


@pytest.mark.parametrize("raw", [b"{nope\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n"])
def test_batch_names_a_line_that_is_no_json_after_its_number(raw: bytes) -> None:
    (line,) = _run(read_requests([b"\n", raw]))
    assert (line["id"], line["error"]["code"]) == ("line-2", "invalid_request")
    assert "line 2 is not JSON" in line["error"]["message"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"url": "/v1/embeddings", "body": {}}, "only POST /v1/chat/completions"),
        ({"body": None}, "body must be an object"),
        ({"body": {"messages": [], "n": 1}}, "at least one message"),
        ({"body": {"tools": [], "messages": []}}, "'tools' is not served"),
    ],
)
def test_batch_tells_in_openais_form_what_is_wrong(line: Any, words: str) -> None:
    (answer,) = _run(_read({"custom_id": "a", **line}))
    assert answer["response"]["status_code"] == 400
    assert words in answer["response"]["body"]["error"]["message"]
    assert answer["error"]["code"] == "invalid_request"


def test_batch_asks_as_many_at_once_as_it_may() -> None:
    backend = Busy()
    assert len(_run(_simple(30), backend, concurrency=4)) == 30
    assert backend.most == 4


def test_batch_reads_no_further_ahead_than_it_must() -> None:
    drawn, answers, ahead = 0, Lines(), []

    def requests() -> Iterator[Request]:
        nonlocal drawn
        for request in _simple(60):
            drawn += 1
            ahead.append(drawn - len(answers.lines))
            yield request

    Batch(Busy(), _prepare(), answers, 3).run(requests())
    assert len(answers.lines) == 60
    waiting = 1 + 3  # before and behind the decoders
    assert max(ahead) <= 3 + waiting + batch._DECODERS + 1


def test_batch_goes_on_after_a_request_that_fails() -> None:
    backend = Busy()
    backend.failing = lambda question: OutOfMemory("too big") if question == "q1" else None
    lines = _run(_simple(4), backend)
    assert {line["id"]: line["type"] for line in lines} == {
        **{id: "answer" for id in "023"},
        "1": "error",
    }


def test_batch_ends_when_the_engine_dies_and_keeps_what_was_answered() -> None:
    backend, answers = Busy(), Lines()
    backend.failing = lambda question: EngineDead("the engine failed") if question == "q3" else None
    with pytest.raises(EngineDead):
        Batch(backend, _prepare(), answers, 1).run(_simple(9))
    assert [line["id"] for line in answers.lines] == ["0", "1", "2"]


def test_batch_ends_when_the_server_is_gone_and_blames_no_request() -> None:
    backend, answers = Busy(), Lines()
    backend.failing = lambda question: NetworkError("gone") if question > "q3" else None
    with pytest.raises(NetworkError, match="gone"):
        Batch(backend, _prepare(), answers, 2).run(_simple(9))
    assert sorted(line["id"] for line in answers.lines) == ["0", "1", "2", "3"]


def test_batch_blames_a_request_that_the_server_fails_at_again_and_again() -> None:
    backend = Busy()
    backend.failing = lambda question: NetworkError("ouch") if question == "q1" else None
    lines = _run(_simple(4), backend, concurrency=1)
    assert [(line["id"], line["type"]) for line in lines] == [
        *(("0", "answer"), ("1", "error"), ("2", "answer"), ("3", "answer"))
    ]


def test_batch_asks_a_server_again_that_was_away_for_a_moment() -> None:
    backend, calls = Busy(), iter([NetworkError("away"), None])
    backend.failing = lambda question: next(calls)
    assert [line["type"] for line in _run(_simple(1), backend)] == ["answer"]


def test_batch_ends_when_answers_cannot_be_written() -> None:
    answers = Lines(room=2)
    with pytest.raises(OSError, match="Input/output"):
        Batch(ScriptedBackend(), _prepare(), answers, 1).run(_simple(9))
    assert len(answers.lines) == 2


def test_batch_gives_up_what_is_under_way_when_interrupted() -> None:
    backend, answers = ScriptedBackend(["word " * 40], delay_s=0.05), Lines()

    def requests() -> Iterator[Request]:
        yield from _simple(1)
        while not backend.seen:
            time.sleep(0.001)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Batch(backend, _prepare(), answers, 1).run(requests())
    assert answers.lines == []


def test_batch_reports_what_it_has_done() -> None:
    told: list[tuple[int, int]] = []

    def report(tally: Tally) -> None:
        told.append((tally.answered, tally.failed))

    requests = [*_simple(2), Request("x", "simple", {}, "it is broken")]
    tally = Batch(ScriptedBackend(), _prepare(), Lines(), 1, report).run(requests)
    assert (len(told), told[-1]) == (3, (2, 1))
    assert tally.completion_tokens == 6


def test_survey_tells_what_is_done_changed_and_foreign() -> None:
    requests = _simple(3)
    done = {"0": requests[0].fingerprint, "1": "another", "x": "y"}
    found = survey(requests, done)
    assert (found.total, found.done, found.changed, found.foreign) == (3, 2, ("1",), 1)


def test_ids_that_come_twice_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="two requests have the id '0'"):
        survey([*_simple(2), *_simple(1)], {})
    with pytest.raises(InvalidRequest, match="two requests have the id '0'"):
        list(unique([*_simple(2), *_simple(1)]))


def test_fingerprint_tells_one_request_from_another() -> None:
    one, same, other = (
        next(picture_requests(["a"], prompt, "")).fingerprint for prompt in ("x", "x", "y")
    )
    assert one == same != other


def test_patterns_are_expanded_sorted_and_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "a.jpg", "deep/er/c.jpg", "[x].jpg", "deep/d.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert expand(["*.jpg", "a.jpg"]) == ["[x].jpg", "a.jpg", "b.jpg"]
    assert expand(["**/*.jpg"]) == ["[x].jpg", "a.jpg", "b.jpg", "deep/er/c.jpg"]
    assert expand(["[x].jpg"]) == ["[x].jpg"]
    assert expand(["http://host/*.jpg", "none.jpg"]) == ["http://host/*.jpg", "none.jpg"]
    with pytest.raises(ImageNotFound, match=r"\*\.gif matches no file"):
        expand(["*.gif"])
