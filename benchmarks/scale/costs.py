"""What a controller's process has to do for a request, a token and a beat, in CPU time.

Called by the command. Dispatch and beats are measured on a `Registry` in this process, the rest on
a real controller between a real socket's two ends: a scripted worker and clients. Other work on the
machine slows such figures but never quickens them, so the least of several repeats is taken.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path
from random import Random
from subprocess import PIPE, Popen
from typing import Any, get_args

import httpx2

from vlmchat.server.dispatch import DispatchMethod, chooser
from vlmchat.server.registry import Registry, WorkerStatus

REPEATS = 20
COUNTS = (1, 10, 100, 1000)
CONVERSATIONS, MESSAGES = 60, 9  # each worker is known to have seen; each request has
TOLD = 64  # prefixes in a beat
CLIENTS, TOKENS, ROUNDS, BEATS = 16, 100, 4, 300
_WORDS = {"words": 1000, "delay_s": 0.02}
# Of one controller's process: `--costs`, 2026-11-23, 2 cores of an Intel Xeon busy with other work.
REQUEST_S, TOKEN_S, BEAT_S = 2.0e-3, 170e-6, 400e-6
_TICKS_S = os.sysconf("SC_CLK_TCK")


def least(act: Callable[[], object], times: int, repeats: int = REPEATS) -> float:
    """CPU seconds of one `act`: the least, over the repeats, of the mean of so many in a row."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        for _ in range(times):
            act()
        found.append((time.process_time() - started) / times)
    return min(found)


def full_registry(policy: DispatchMethod, workers: int) -> tuple[Registry, list[list[str]]]:
    """A registry whose workers have conversations and queues; some conversations, a message short.

    Whoever asks adds a message that nobody has seen.
    """
    random, requests = Random(1), []
    registry = Registry(chooser(policy, random), lambda: 0.0)
    for n in range(workers):
        queue = random.randrange(6)
        registry.register(f"w{n}", True, WorkerStatus(("m",), 1, queue, {"openai": True}))
        for conversation in range(CONVERSATIONS):
            hashes = [f"{n:06x}{conversation:06x}{k:04x}" for k in range(MESSAGES)]
            for start in range(0, MESSAGES, TOLD):
                told = {"openai": True, "prefixes": ["system", *hashes[start : start + TOLD]]}
                registry.beat(f"w{n}", queue, told)
            requests.append(["system", *hashes])
    random.shuffle(requests)
    return registry, requests[:1000]


def dispatch_s(policy: DispatchMethod, workers: int) -> float:
    """CPU seconds to choose a worker, take the place there and give it back."""
    registry, requests = full_registry(policy, workers)
    turn, number = cycle(requests), count()

    def act() -> None:
        request = [*next(turn), f"{next(number):016x}"]
        lease = registry.lease("m", request, fits=lambda worker: worker.is_ours)
        assert lease is not None
        lease.give_back()

    return least(act, 200)


def beat_s(workers: int) -> float:
    """CPU seconds of the registry for a beat, of whose 64 prefixes 9 are new."""
    registry, _ = full_registry("cache_aware", workers)
    number = count()

    def act() -> None:
        n = next(number)
        told = [f"b{k:015x}" for k in range(n * MESSAGES, n * MESSAGES + TOLD)]
        registry.beat(f"w{n % workers}", 3, {"openai": True, "prefixes": told})

    def only_made() -> None:
        n = next(number)
        [f"b{k:015x}" for k in range(n * MESSAGES, n * MESSAGES + TOLD)]

    return least(act, 200) - least(only_made, 200)


def relay_s() -> dict[str, float]:
    """CPU seconds of a controller's process for a streamed request, a token and a beat. Linux."""
    controller = [sys.executable, "-m", "vlmchat", "controller", "--port", "0", "--json"]
    scripted = [sys.executable, "-m", "tests.server.scripted_worker", json.dumps(_WORDS)]
    with (
        Popen(controller, stdout=PIPE, text=True) as front,
        Popen(scripted, stdout=PIPE, text=True) as back,
    ):
        try:
            assert front.stdout is not None
            assert back.stdout is not None
            url, worker = json.loads(front.stdout.readline())["url"], back.stdout.readline().strip()
            return asyncio.run(_relayed(url, worker, front.pid))
        finally:
            front.kill()
            back.kill()


async def _relayed(url: str, worker: str, pid: int) -> dict[str, float]:
    limits = httpx2.Limits(max_connections=CLIENTS)
    async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=60) as http:

        async def post(path: str, body: dict[str, Any]) -> None:
            (await http.post(path, json=body)).raise_for_status()

        async def cpu_s(times: int, path: str, body: dict[str, Any]) -> float:
            """Of one of so many, asked by all clients at once."""
            before = _cpu_s(pid)
            gate = asyncio.Semaphore(CLIENTS)

            async def one() -> None:
                async with gate:
                    await post(path, body)

            await asyncio.gather(*(one() for _ in range(times)))
            return (_cpu_s(pid) - before) / times

        async def asked(tokens: int) -> float:
            body = {"model": "m", "stream": True, "max_tokens": tokens}
            body["messages"] = [{"role": "user", "content": "hi"}]
            rounds = [await cpu_s(4 * CLIENTS, "/v1/chat/completions", body) for _ in range(ROUNDS)]
            return min(rounds)

        await post("/register_worker", {"worker_name": worker, "check_heart_beat": False})
        told = {"openai": True, "prefixes": [f"{n:016x}" for n in range(TOLD)]}
        beat = {"worker_name": worker, "queue_length": 0, "vlmchat": told}
        short, long = await asked(1), await asked(TOKENS)
        beats = [await cpu_s(BEATS, "/receive_heart_beat", beat) for _ in range(ROUNDS)]
        token = (long - short) / (TOKENS - 1)
        return {"request_s": short - token, "token_s": token, "beat_s": min(beats)}


def _cpu_s(pid: int) -> float:
    """User and system time of a process so far; proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_S


def controller_cores(requests: float, tokens: float, beats: float) -> float:
    """How many processes are busy with so many a second."""
    return requests * REQUEST_S + tokens * TOKEN_S + beats * BEAT_S


def costs() -> dict[str, Any]:
    """All of it, in microseconds."""
    dispatch = {
        policy: {n: round(dispatch_s(policy, n) * 1e6, 1) for n in COUNTS}
        for policy in get_args(DispatchMethod)
    }
    beats = {n: round(beat_s(n) * 1e6, 1) for n in COUNTS}
    relayed = {name: round(value * 1e6, 1) for name, value in relay_s().items()}
    return {"dispatch_us": dispatch, "beat_us": beats, "controller_us": relayed}


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| CPU time, µs | " + " | ".join(f"{n} workers" for n in COUNTS) + " |"]
    lines += ["|---" * (len(COUNTS) + 1) + "|"]
    rows = {**found["dispatch_us"], "beat": found["beat_us"]}
    lines += [
        f"| {name} | " + " | ".join(f"{v}" for v in row.values()) + " |"
        for name, row in rows.items()
    ]
    whole = found["controller_us"]
    told = f"request {whole['request_s']}, token {whole['token_s']}, beat {whole['beat_s']}"
    return "\n".join(lines) + f"\n\nA controller's process, µs of CPU: {told}"
