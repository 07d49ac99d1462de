"""A worker's word to its controller: here I am, this is my queue, and, at the end, goodbye.

Called by `commands/worker` as a task beside the server. Speaks LLaVA's wire, so that controllers of
either kind understand it. A controller that is away never holds the worker up: it is told again
and again, ever more seldom, until it answers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx2

logger = logging.getLogger(__name__)

INTERVAL_S = 15.0  # LLaVA's; controllers forget a worker after 30 s of silence
TIMEOUT_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0


@dataclass(frozen=True, slots=True)
class Registration:
    """Who tells whom: addresses as each reaches the other, and the controller's key for workers."""

    controller: str
    worker: str
    key: str | None = None


class Heartbeat:
    """Registers, beats, registers anew when it was forgotten.

    status() gives LLaVA's status object, with ours in its key `vlmchat`.
    """

    def __init__(
        self,
        registration: Registration,
        status: Callable[[], dict[str, Any]],
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._registration, self._status, self._interval_s = registration, status, interval_s
        self._changed = asyncio.Event()
        headers = {"authorization": f"Bearer {registration.key}"} if registration.key else {}
        self._http = httpx2.AsyncClient(
            base_url=registration.controller.rstrip("/"),
            headers=headers,
            timeout=TIMEOUT_S,
            trust_env=False,
        )
        self.registered = self._over = False

    def changed(self) -> None:
        """The queue has changed: the next beat comes at once."""
        self._changed.set()

    async def run(self) -> None:
        """Until `goodbye`."""
        pause_s, told = FIRST_PAUSE_S, ""
        while not self._over:
            try:
                if not self.registered:
                    await self._register()
                elif not await self._beat():
                    logger.warning("the controller has forgotten this worker; registering again")
                    self.registered = False
                    continue
                pause_s, told = FIRST_PAUSE_S, ""
            except (httpx2.HTTPError, ValueError) as error:
                reason = _reason(error)
                level = logging.WARNING if reason != told else logging.DEBUG
                told = reason
                logger.log(
                    level, "controller %s: %s; trying on", self._registration.controller, reason
                )
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                continue
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._interval_s)

    async def goodbye(self) -> None:
        """Tell the controller that this worker answers no more; LLaVA's knows no such word."""
        self._over = True
        self.changed()
        if self.registered:
            with suppress(httpx2.HTTPError):
                await self._post("/unregister_worker", {"worker_name": self._registration.worker})
        self.registered = False

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def _register(self) -> None:
        await self._post(
            "/register_worker",
            {
                "worker_name": self._registration.worker,
                "check_heart_beat": True,
                "worker_status": self._status(),
            },
        )
        self.registered = True
        logger.info("registered with %s", self._registration.controller)

    async def _beat(self) -> bool:
        """Whether the controller still knows this worker."""
        status = self._status()
        answer = await self._post(
            "/receive_heart_beat",
            {
                "worker_name": self._registration.worker,
                "queue_length": status["queue_length"],
                "vlmchat": status["vlmchat"],
            },
        )
        return isinstance(answer, dict) and answer.get("exist") is True

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = await self._http.post(path, json=body)
        response.raise_for_status()
        return response.json()


def _reason(error: Exception) -> str:
    """On one line; a controller's own words where it has refused."""
    if isinstance(error, httpx2.HTTPStatusError):
        with suppress(ValueError, KeyError, TypeError):
            return str(error.response.json()["error"]["message"])[:500]
        return f"answered {error.response.status_code}"
    return str(error) or type(error).__name__
