"""A replica: the worker of one model in a process of Ray's.

Made by Ray Serve, as many as the plan and the load ask for; asked by the front through a
deployment handle. It tells the fronts how it is as a worker tells its controller, and Ray, when
asked whether it is well, by a token that it generates.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from ray import serve

from vlmchat.cluster.in_process import Head, asked
from vlmchat.cluster.plan import APPLICATION, FRONT
from vlmchat.errors import EngineDead, WorkerFailed
from vlmchat.request import Backend
from vlmchat.server.app import EdgePolicy
from vlmchat.server.openai_relay import PATH
from vlmchat.server.worker import PING, Worker, WorkerPolicy

logger = logging.getLogger(__name__)

BEAT_S = 2.0
_BEAT_TIMEOUT_S = 5.0
_QUIET_S = 10.0  # one that has said something this lately is well
_STUCK_S = 60.0  # one that has answers under way, and says nothing for so long, is not


class Replica:
    """See the module."""

    def __init__(
        self, name: str, load: Callable[[], Backend], policy: WorkerPolicy, resumes: bool
    ) -> None:
        """Loads the model. Raises what loading raises; Ray tries again elsewhere."""
        self._id = serve.get_replica_context().replica_tag
        # Who may ask, and with how much, the front has decided; so it also says for whom it asks.
        edge = EdgePolicy(max_body_bytes=2**62, max_held_bytes=2**62)
        self._worker = Worker(name, policy, edge, _log_line, trusts=lambda client: True)
        self._worker.ready(load(), resumes=resumes)
        self._last_word = time.monotonic()
        self._front = serve.get_deployment_handle(FRONT, APPLICATION)
        self._beating = asyncio.get_running_loop().create_task(self._beat())

    async def answer(
        self,
        path: str,
        body: bytes,
        headers: dict[str, str],
        prefixes: Sequence[str] = (),
        avoid: Sequence[str] = (),
    ) -> AsyncGenerator[str | tuple[int, list[tuple[bytes, bytes]]] | bytes]:
        """Who answers, then status and headers, then the body's parts.

        prefixes, avoid: for the router, which has read them before.
        """
        yield self._id
        async with aclosing(asked(self._worker.edge, "POST", path, body, headers)) as parts:
            async for part in parts:
                if part != PING:
                    self._last_word = time.monotonic()
                yield (part.status, part.headers) if isinstance(part, Head) else part

    async def metrics(self) -> tuple[str, bytes]:
        """Its name, and its page for Prometheus."""
        async with aclosing(asked(self._worker.edge, "GET", "/metrics")) as parts:
            page = b"".join([part async for part in parts if isinstance(part, bytes)])
        return self._id, page

    def record_routing_stats(self) -> dict[str, Any]:
        """For routers that begin anew: what its prompts began with."""
        return {"prefixes": self._worker.status()["vlmchat"]["prefixes"]}

    async def check_health(self) -> None:
        """Raises where no token is to be had; Ray then replaces the replica."""
        silent_s = time.monotonic() - self._last_word
        if self._worker.state() == "dead":
            raise EngineDead("the engine has stopped")
        if silent_s < _QUIET_S:
            return
        if self._worker.queue_length:
            if silent_s > _STUCK_S:
                raise WorkerFailed(f"no token for {silent_s:.0f} s")
            return
        messages = [{"role": "user", "content": "hi"}]
        probe = {"messages": messages, "max_tokens": 1, "temperature": 0}
        async with aclosing(
            asked(self._worker.edge, "POST", PATH, json.dumps(probe).encode())
        ) as parts:
            async for part in parts:
                if isinstance(part, Head) and part.status not in (200, 429):
                    raise WorkerFailed(f"answered a probe with {part.status}")

    async def _beat(self) -> None:
        """How it stands, to every front, for as long as it lives."""
        while True:
            told = self._front.broadcast("beat", self._id, self._worker.status())
            try:
                await told.results_async(timeout_s=_BEAT_TIMEOUT_S, return_exceptions=True)
            except Exception as error:  # the heart beat: nothing may end it
                logger.warning("no front heard: %s", error)
            await asyncio.sleep(BEAT_S)

    async def __del__(self) -> None:
        """Ray calls this once all that ran has ended, or has had its time."""
        self._beating.cancel()
        self._worker.close()


def _log_line(record: dict[str, Any]) -> None:
    print(json.dumps(record), file=sys.stderr, flush=True)
