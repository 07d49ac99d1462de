"""What a client has had of its answer, and how the next worker is asked to go on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vlmchat.server.failover import Refusal, WorkerLost
from vlmchat.server.openai_relay import OpenAIWire, assemble
from vlmchat.server.registry import Worker, WorkerStatus

ASK = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
OURS = Worker("w", WorkerStatus(("m",), 1, 0, {"openai": True}), True, 0)
NO_IDS = Worker("x", WorkerStatus(("m",), 1, 0, {"openai": True, "resume": False}), True, 0)


def chunk(
    text: str | None, ids: list[int] | None = None, reason: str | None = None, index: int = 0
) -> bytes:
    """An event as a worker sends it; text None: its first one."""
    delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
    body: dict[str, Any] = {"id": "one", "created": 1, "model": "m", "choices": [choice]}
    if ids is not None:
        body["vlmchat_token_ids"] = ids
    return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def fed(wire: OpenAIWire, data: bytes) -> list[dict[str, Any]]:
    return list(wire.feed(data))


def said(items: list[dict[str, Any]]) -> str:
    return "".join(c["delta"].get("content") or "" for item in items for c in item["choices"])


def begun(*events: bytes, **body: Any) -> OpenAIWire:
    """A wire that has had these events from its first worker."""
    wire = OpenAIWire({**ASK, **body}, include_usage=False)
    wire.request(OURS)
    for event in events:
        fed(wire, event)
    return wire


def test_wire_asks_the_next_worker_to_go_on_behind_all_tokens_also_those_without_text() -> None:
    wire = begun(chunk(None), chunk("a", [1, 2]), chunk("", [3]), chunk("b", [4]))
    assert wire.request(OURS)[1]["vlmchat_resume"] == [1, 2, 3, 4]


def test_wire_goes_on_behind_the_tokens_that_the_client_itself_resumed_with() -> None:
    wire = begun(chunk(None), chunk("a", [7]), vlmchat_resume=[5, 6])
    assert wire.request(OURS)[1]["vlmchat_resume"] == [5, 6, 7]


def test_wire_sends_ends_only_when_the_stream_has_ended_well() -> None:
    wire = begun(chunk(None), chunk("a", [1]))
    assert fed(wire, chunk("b", [2], "stop")) == []
    assert wire.request(OURS)[1]["vlmchat_resume"] == [1]
    items = fed(wire, chunk(None) + chunk("b", [2], "stop") + DONE)
    assert (said(items), wire.done) == ("b", True)


@pytest.mark.parametrize("worker", [OURS, NO_IDS])
def test_wire_holds_a_second_telling_against_the_first_where_tokens_are_not_told(
    worker: Worker,
) -> None:
    wire = begun(chunk(None), chunk("one ", []), chunk("two ", []))
    assert "vlmchat_resume" not in wire.request(worker)[1]
    again = chunk(None) + chunk("one tw") + chunk("o three") + chunk("", None, "stop") + DONE
    assert said(fed(wire, again)) == "three"
    assert wire.done


@pytest.mark.parametrize("again", [chunk("one x"), chunk("one", None, "stop")])
def test_wire_loses_a_worker_whose_second_telling_differs(again: bytes) -> None:
    wire = begun(chunk(None), chunk("one two"))
    wire.request(OURS)
    with pytest.raises(WorkerLost):
        fed(wire, again)


def test_wire_goes_on_with_each_choice_that_has_not_ended() -> None:
    wire = begun(
        *(chunk(None, index=i) for i in range(3)),
        chunk("a", [1], index=0),
        chunk("b", [2], "stop", index=1),
        chunk("c", [3], index=2),
        n=3,
    )
    first = wire.request(OURS)[1]
    assert (first["n"], first["vlmchat_resume"]) == (1, [1])
    items = fed(wire, chunk(None) + chunk("A", [4], "stop") + DONE)
    assert ([c["index"] for item in items for c in item["choices"]], wire.done) == ([0], False)
    assert wire.request(OURS)[1]["vlmchat_resume"] == [3]
    items = fed(wire, chunk(None) + chunk("C", [5], "stop") + DONE)
    assert ([c["index"] for item in items for c in item["choices"]], wire.done) == ([2], True)


def test_wire_keeps_ids_to_itself_unless_the_client_wants_them() -> None:
    assert "vlmchat_token_ids" not in fed(begun(), chunk("a", [1]))[0]
    assert fed(begun(vlmchat_token_ids=True), chunk("a", [1]))[0]["vlmchat_token_ids"] == [1]


@pytest.mark.parametrize(
    "data",
    [b"data: {\n\n", b"data: []\n\n", b'data: {"choices": 1}\n\n', b'data: {"choices": [1]}\n\n'],
)
def test_wire_loses_a_worker_that_talks_nonsense(data: bytes) -> None:
    with pytest.raises(WorkerLost):
        fed(begun(), data)


def test_wire_tells_errors_of_the_request_from_those_of_the_worker() -> None:
    def event(code: str) -> bytes:
        return b"data: " + json.dumps({"error": {"code": code, "message": "x"}}).encode() + b"\n\n"

    with pytest.raises(WorkerLost):
        fed(begun(), event("engine_dead"))
    with pytest.raises(Refusal):
        fed(begun(), event("invalid_request"))


def test_wire_sends_what_came_before_a_failure_in_the_same_read() -> None:
    wire = begun(chunk(None))
    items = wire.feed(chunk("a", [1]) + b"data: nonsense\n\n")
    first = next(items)
    with pytest.raises(WorkerLost):
        next(items)
    assert (said([first]), wire.request(OURS)[1]["vlmchat_resume"]) == ("a", [1])


def test_wire_reads_events_however_they_are_cut() -> None:
    wire, stream = begun(), chunk(None) + b": ping\r\n\r\n" + chunk("a\n", [1])
    items = [item for i in range(len(stream)) for item in wire.feed(stream[i : i + 1])]
    assert said(items) == "a\n"


def test_assemble_joins_logprobs_and_keeps_what_else_there_is() -> None:
    part = {"index": 0, "delta": {"content": "a"}, "finish_reason": None}
    logprobs = {"content": [{"token": "a"}], "refusal": None}
    chunks: list[dict[str, Any]] = [
        {"id": "i", "vlmchat_trimmed": {"turns": 1}, "choices": [{**part, "logprobs": logprobs}]},
        {"id": "i", "choices": [{**part, "logprobs": logprobs, "finish_reason": "stop"}]},
        {"id": "i", "choices": [], "usage": {"total_tokens": 3}},
    ]
    whole = assemble(chunks)
    assert (whole["vlmchat_trimmed"], whole["usage"]) == ({"turns": 1}, {"total_tokens": 3})
    assert len(whole["choices"][0]["logprobs"]["content"]) == 2
    assert whole["choices"][0]["finish_reason"] == "stop"
