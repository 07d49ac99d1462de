"""A worker in a thread of this process, on a port of its own, as clients meet it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
from openai import OpenAI

from tests.fakes import ScriptedBackend
from vlmchat.request import Backend
from vlmchat.server.app import EdgePolicy
from vlmchat.server.serve import Server, bind, port_of
from vlmchat.server.worker import Worker, WorkerPolicy

MODEL = "scripted"


@dataclass
class Running:
    """A worker that listens at `url`; `log` are the records of its requests so far."""

    worker: Worker
    url: str
    loop: asyncio.AbstractEventLoop
    server: Server
    log: list[dict[str, Any]] = field(default_factory=list)

    def call(self, function: Callable[[], Any]) -> None:
        """Call it in the server's thread."""
        self.loop.call_soon_threadsafe(function)

    def http(self, **options: Any) -> httpx2.Client:
        """A plain client."""
        return httpx2.Client(base_url=self.url, timeout=20, trust_env=False, **options)

    def openai(self, key: str = "none") -> OpenAI:
        """OpenAI's own client, which does not retry."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def recorded(self, count: int) -> list[dict[str, Any]]:
        """The log, once it holds so many records: one is written after its answer."""
        waiting = threading.Event()
        for _ in range(1000):
            if len(self.log) >= count:
                break
            waiting.wait(0.01)
        return self.log


@contextmanager
def running(
    backend: Backend | None,
    policy: WorkerPolicy | None = None,
    edge: EdgePolicy | None = None,
) -> Iterator[Running]:
    """A worker over `backend`; None: its model is still loading."""
    started = threading.Event()
    made: list[Running] = []

    async def serve() -> None:
        log: list[dict[str, Any]] = []
        worker = Worker(MODEL, policy or WorkerPolicy(), edge or EdgePolicy(), log.append)
        if backend is not None:
            worker.ready(backend)
        with bind("127.0.0.1", 0) as sock:
            server = Server(worker.edge, worker.drain)
            url = f"http://127.0.0.1:{port_of(sock)}"
            made.append(Running(worker, url, asyncio.get_running_loop(), server, log))
            started.set()
            await server.run_on(sock)
        worker.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="test-worker")
    thread.start()
    try:
        assert started.wait(20)
        yield made[0]
    finally:
        made[0].call(made[0].server.stop)
        thread.join(40)
        assert not thread.is_alive()


def counting(answers: int = 1, words: int = 2000, delay_s: float = 0.01) -> ScriptedBackend:
    """A backend whose answers take their time."""
    said = [" ".join(map(str, range(words)))] * answers
    return ScriptedBackend(said, context_length=4 * words, delay_s=delay_s)
