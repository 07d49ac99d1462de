"""The OpenAI wire as a controller carries it on: streams of chunks, gone on with elsewhere.

Called by the controller for one request each; `failover.Relay` drives it. A worker is always asked
to stream and to send the ids of its tokens; from these, and for whoever has none from the text, the
next worker goes on. No I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmchat.server.failover import ELSEWHERE, Item, Refusal, WorkerLost
from vlmchat.server.registry import Worker

PATH = "/v1/chat/completions"
_MAX_EVENT_BYTES = 16 * 2**20
_MAX_CHOICES = 128  # OpenAI's; workers take fewer
_TOKEN_IDS = "vlmchat_token_ids"


class Overlap:
    """Text that comes a second time, held against what was sent the first time."""

    def __init__(self, sent: str) -> None:
        self._left = sent

    @property
    def behind(self) -> bool:
        """Whether not all has come again yet."""
        return bool(self._left)

    def fresh(self, text: str) -> str:
        """What of `text` goes beyond. Raises WorkerLost where it differs from what was sent."""
        size = min(len(text), len(self._left))
        if text[:size] != self._left[:size]:
            raise WorkerLost("answers otherwise than the worker before", suspect=False)
        self._left = self._left[size:]
        return text[size:]


@dataclass(slots=True)
class _Choice:
    """One choice as the client has it. ids: of the tokens of `text`; None: not told of all."""

    text: str = ""
    ids: list[int] | None = field(default_factory=list)
    opened: bool = False  # its first chunk, with the role, is sent
    finished: bool = False


class OpenAIWire:
    """See `failover.Wire`. Items are chunks, as the client is to have them."""

    def __init__(self, body: Item, include_usage: bool) -> None:
        """body: the client's request. include_usage: send that chunk, asked for or not."""
        self._body = body
        self._wants_ids = body.get(_TOKEN_IDS) is True
        self._include_usage = include_usage
        given = body.get("vlmchat_resume")
        self._given = given if isinstance(given, list) else []
        count = body.get("n")
        asked = count if type(count) is int and 1 <= count <= _MAX_CHOICES else 1
        self._choices = [_Choice() for _ in range(asked)]
        self._first: Item | None = None  # the first chunk: the answer's id, time and model
        self._held: list[Item] = []  # ends of choices, until the stream has ended well
        self._lines = b""
        self._only: int | None = None  # the one choice that this worker goes on with
        self._overlap: Overlap | None = None
        self.usage: Any = None  # what the last worker said of its tokens
        self.done = False
        self.begun = False

    def fits(self, worker: Worker) -> bool:
        """See `failover.Wire.fits`."""
        return worker.is_ours

    def request(self, worker: Worker) -> tuple[str, Item]:
        """See `failover.Wire.request`."""
        self._held, self._lines, self._only, self._overlap = [], b"", None, None
        body = {**self._body, "stream": True, _TOKEN_IDS: True}
        body["stream_options"] = {"include_usage": True}
        if self.begun:
            self._only = next(i for i, c in enumerate(self._choices) if not c.finished)
            choice = self._choices[self._only]
            if len(self._choices) > 1:
                body["n"] = 1
            if choice.ids is None or (choice.ids and not worker.resumes):
                self._overlap = Overlap(choice.text)
            elif choice.ids:
                body["vlmchat_resume"] = [*self._given, *choice.ids]
        return PATH, body

    def feed(self, chunk: bytes) -> Iterator[Item]:
        """See `failover.Wire.feed`."""
        *lines, self._lines = (self._lines + chunk).replace(b"\r\n", b"\n").split(b"\n")
        if len(self._lines) > _MAX_EVENT_BYTES:
            raise WorkerLost("sent an event without end")
        for line in lines:
            if line.startswith(b"data:") and not self.done:
                for item in self._event(line[5:].strip()):
                    self.begun = True
                    yield item

    def end(self) -> Iterator[Item]:
        """See `failover.Wire.end`."""
        raise WorkerLost("cut its answer off")

    def _event(self, data: bytes) -> list[Item]:
        if data == b"[DONE]":
            return self._end_of_stream()
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise WorkerLost("sent what is not JSON") from None
        if not isinstance(chunk, dict):
            raise WorkerLost("sent what is no chunk")
        error = chunk.get("error")
        if isinstance(error, dict):
            if error.get("code") in ELSEWHERE:
                full = error["code"] == "overloaded"  # told late, after pings: it is well
                raise WorkerLost(f"{error['code']}: {error.get('message')}", suspect=not full)
            raise Refusal(200, error)
        return self._chunk(chunk)

    def _end_of_stream(self) -> list[Item]:
        """Only now is it sure that ends need not be asked for once more."""
        items, self._held = self._held, []
        for item in items:
            for choice in item.get("choices", ()):
                self._choices[choice["index"]].finished = True
        if self._only is not None and not self._choices[self._only].finished:
            raise WorkerLost("ended without a reason")
        self.done = self._only is None or all(choice.finished for choice in self._choices)
        self.usage = next((item.get("usage") for item in items if not item["choices"]), None)
        whole = self.done and self._include_usage
        return items if whole else [item for item in items if item["choices"]]

    def _chunk(self, chunk: Item) -> list[Item]:
        first = self._first = self._first or chunk
        same: Item = {key: first[key] for key in ("id", "created", "model") if key in first}
        chunk = {**chunk, **same}
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise WorkerLost("sent a chunk without choices")
        ids = chunk.pop(_TOKEN_IDS, None)
        chunk["choices"] = [self._choice(choice) for choice in choices]
        if self._wants_ids and ids is not None:
            chunk[_TOKEN_IDS] = ids
        ended = not choices or any(c.get("finish_reason") for c in chunk["choices"])
        if ended or self._held:
            self._held.append(chunk)
            return self._take_held()
        new = self._wants_ids or any(c["delta"] for c in chunk["choices"])
        self._commit(chunk, ids)
        return [chunk] if new else []

    def _choice(self, choice: Any) -> Item:
        """The choice as the client is to have it: its delta holds what is new only."""
        if not isinstance(choice, dict):
            raise WorkerLost("sent a choice that is none")
        index = self._only if self._only is not None else choice.get("index", 0)
        if index not in range(len(self._choices)):
            raise WorkerLost("sent a choice that was not asked for")
        known, delta = self._choices[index], dict(choice.get("delta") or {})
        text = delta.get("content")
        if known.opened:
            delta.pop("role", None)
        if self._overlap is not None:
            if text:
                delta["content"] = self._overlap.fresh(text)
            if choice.get("finish_reason") and self._overlap.behind:
                raise WorkerLost("answers less than the worker before", suspect=False)
        if known.opened:
            delta = {key: value for key, value in delta.items() if value}
        return {**choice, "index": index, "delta": delta}

    def _take_held(self) -> list[Item]:
        """While other choices go on, an end among several may go out as soon as it comes."""
        if len(self._choices) == 1 or self._only is not None:
            return []
        items = [item for item in self._held if item["choices"]]
        self._held = [item for item in self._held if not item["choices"]]
        for item in items:
            self._commit(item, item.get(_TOKEN_IDS))
            for choice in item["choices"]:
                self._choices[choice["index"]].finished |= bool(choice.get("finish_reason"))
        return items

    def _commit(self, chunk: Item, ids: Any) -> None:
        """Note what the client now has."""
        for choice in chunk["choices"]:
            known = self._choices[choice["index"]]
            known.opened = True
            known.text += choice["delta"].get("content") or ""
            if isinstance(ids, list) and self._overlap is None and known.ids is not None:
                known.ids += ids
            elif choice["delta"].get("content"):
                known.ids = None
            if known.text and not known.ids:
                known.ids = None  # text, but no tokens: the worker does not tell them


def assemble(chunks: Sequence[Item]) -> Item:
    """One chat.completion of all the chunks of an answer."""
    whole: Item = {"choices": [], "usage": None}
    choices: dict[int, Item] = {}
    for chunk in chunks:
        ids = chunk.get(_TOKEN_IDS)
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], _empty_choice(part["index"]))
            _add(choice, part)
            if isinstance(ids, list):
                choice.setdefault(_TOKEN_IDS, []).extend(ids)
        rest = {key: value for key, value in chunk.items() if key not in ("choices", _TOKEN_IDS)}
        whole = {**whole, **{key: value for key, value in rest.items() if value is not None}}
    whole["choices"] = [choices[index] for index in sorted(choices)]
    return {**whole, "object": "chat.completion"}


def _empty_choice(index: int) -> Item:
    message = {"role": "assistant", "content": "", "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": None}


def _add(choice: Item, part: Item) -> None:
    choice["message"]["content"] += part["delta"].get("content") or ""
    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    logprobs = part.get("logprobs")
    if isinstance(logprobs, dict):
        if choice["logprobs"] is None:
            choice["logprobs"] = {**logprobs, "content": []}
        choice["logprobs"]["content"] += logprobs.get("content") or []
