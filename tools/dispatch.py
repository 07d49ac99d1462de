"""Measure the dispatch methods: how much of the prompts is cached, how soon answers begin.

    python -m tools.dispatch [--workers 2] [--clients 6] [--conversations 24] [--turns 4]

Conversations of several turns, each about a picture of its own, are asked through a controller,
greedily and streamed, with each method in turn; servers are fresh each time. docs/serving.md has
a table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import httpx2

from tools.chaos import MODEL, Message, Process, message, picture

METHODS = ("lottery", "shortest_queue", "cache_aware")
QUESTIONS = (
    "Describe the image.",
    "How many shapes are there?",
    "What colours do you see?",
    "What is in the center?",
    "Is there a star?",
    "Which shape is the largest?",
)
MAX_TOKENS = 24
TIMEOUT_S = 300.0


@dataclass(slots=True)
class Measured:
    """One method's figures: tokens of prompts, and seconds to the first token of later turns."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_turn_s: list[float] = field(default_factory=list)
    later_turns_s: list[float] = field(default_factory=list)
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked."""

    workers: int
    clients: int
    conversations: int
    turns: int


async def measure(method: str, load: Load, log: TextIO) -> Measured:
    """One method, on a controller and workers of its own."""
    controller = Process("controller", ("--port", "0", "--dispatch-method", method), log)
    workers: list[Process] = []
    try:
        await controller.start()
        arguments = ("--model-path", MODEL, "--port", "0", "--controller-address", controller.url)
        workers = [Process("worker", arguments, log) for _ in range(load.workers)]
        await asyncio.gather(*(worker.start() for worker in workers))
        return await _ask_all(controller.url, load)
    finally:
        for process in (*workers, controller):
            await process.kill()


async def _ask_all(url: str, load: Load) -> Measured:
    found, chance = Measured(), random.Random(0)
    waiting = [picture(chance) for _ in range(load.conversations)]
    async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as http:

        async def client() -> None:
            while waiting:
                await _converse(http, waiting.pop(), load.turns, found)

        for warm_up in range(load.workers * 2):
            await _converse(http, picture(random.Random(-1 - warm_up)), 1, Measured())
        begin = time.monotonic()
        await asyncio.gather(*(client() for _ in range(load.clients)))
        found.total_s = time.monotonic() - begin
    return found


async def _converse(http: httpx2.AsyncClient, url: str, turns: int, found: Measured) -> None:
    messages: list[Message] = []
    for turn in range(turns):
        messages.append(message(QUESTIONS[turn % len(QUESTIONS)], None if turn else url))
        text, first_s = await _ask(http, messages, found)
        (found.later_turns_s if turn else found.first_turn_s).append(first_s)
        messages.append({"role": "assistant", "content": text})


async def _ask(
    http: httpx2.AsyncClient, messages: Sequence[Message], found: Measured
) -> tuple[str, float]:
    body = {
        "model": MODEL,
        "messages": messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin, first_s, text = time.monotonic(), 0.0, ""
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                said = choice["delta"].get("content") or ""
                if said and not text:
                    first_s = time.monotonic() - begin
                text += said
            if usage := chunk.get("usage"):
                found.prompt_tokens += usage["prompt_tokens"]
                found.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
    return text, first_s


def table(measured: dict[str, Measured]) -> str:
    """For docs/serving.md."""
    head = "| method | prompt tokens cached | first token, first turn | later turns | 95 % | all |"
    rows = [head, "|---|---|---|---|---|---|"]
    for method, found in measured.items():
        later = sorted(found.later_turns_s)
        rows.append(
            f"| {method} | {found.cached_tokens / found.prompt_tokens:.0%} "
            f"| {statistics.median(found.first_turn_s) * 1000:.0f} ms "
            f"| {statistics.median(later) * 1000:.0f} ms "
            f"| {later[int(0.95 * len(later))] * 1000:.0f} ms | {found.total_s:.1f} s |"
        )
    return "\n".join(rows)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=4)
    given = parser.parse_args()
    load = Load(given.workers, given.clients, given.conversations, given.turns)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        print(table({method: asyncio.run(measure(method, load, log)) for method in METHODS}))


if __name__ == "__main__":
    main()
