"""Answers as JSON, one object a line, in the schema of docs/json.md.

Called by the one-shot command and by batches; stdout gets these objects and nothing else. Knows
nothing of terminals, sessions or models.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from vlmchat.json_line import json_line
from vlmchat.request import DrawnToken, FinishReason, Status, Timings, Usage

if TYPE_CHECKING:
    from vlmchat.conversation import Conversation
    from vlmchat.session import Reply, Trimmed

JSON_SCHEMA = 1


class Answered(Protocol):
    """An answer that has ended: a `Reply`, or one line of a batch."""

    answer: str
    finish_reason: FinishReason | None
    usage: Usage | None
    timings: Timings | None
    tokens: tuple[DrawnToken, ...]
    trimmed: Trimmed
    conversation: Conversation


class JsonPrinter:
    """Answers for programs: one JSON object a turn, one line each, flushed at once.

    stream_deltas: before it one object for each piece of text.
    """

    def __init__(self, stream: TextIO, *, stream_deltas: bool = False) -> None:
        self._stream = stream
        self._stream_deltas = stream_deltas

    def answer(self, reply: Reply, status: Status) -> None:
        """Run `reply` to its end and print it. KeyboardInterrupt passes once all is printed."""
        try:
            with reply:
                for delta in reply:
                    if self._stream_deltas and delta.text:
                        self._print({"schema": JSON_SCHEMA, "type": "delta", "text": delta.text})
        except KeyboardInterrupt:
            self._print(answer_json(reply, status))
            raise
        self._print(answer_json(reply, status))

    def _print(self, value: dict[str, Any]) -> None:
        self._stream.write(json_line(value, self._stream) + "\n")
        self._stream.flush()


def answer_json(reply: Answered, status: Status) -> dict[str, Any]:
    """The answer object of schema 1; counts that nobody knows are null."""
    usage, timings, trimmed = reply.usage, reply.timings, reply.trimmed
    tokens = {"tokens": [asdict(token) for token in reply.tokens]} if reply.tokens else {}
    return {
        "schema": JSON_SCHEMA,
        "type": "answer",
        "model": status.model,
        "answer": reply.answer.strip(),
        "finish_reason": reply.finish_reason,
        "usage": {
            "prompt_tokens": usage and usage.prompt_tokens,
            "image_tokens": usage and usage.image_tokens,
            "cached_tokens": usage and usage.cached_tokens,
            "completion_tokens": usage and usage.completion_tokens,
        },
        "timings": {
            "load": round(status.load_s, 4),
            "first_token": timings and round(timings.first_token_s, 4),
            "total": timings and round(timings.total_s, 4),
            "tokens_per_second": timings and round(timings.tokens_per_second, 2),
        },
        "images": [
            {
                "source": image.source,
                "sha256": image.sha256,
                "width": image.width,
                "height": image.height,
            }
            for image in reply.conversation.images
        ],
        "trimmed": {
            "turns": trimmed.turns,
            "tokens": trimmed.tokens,
            "images": [image.source for image in trimmed.images],
        },
        **tokens,
    }
