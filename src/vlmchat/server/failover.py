"""One answer, carried over as many workers as it takes.

Called by the controller, once for each request. A worker is lost when it refuses, cuts off, says
that it failed, or is silent: without a byte for a moment it is asked whether it is there, without a
token for long it is taken for dead. Then the next one goes on from what the client has. What is
said on a wire, and how to go on, is the `Wire`'s business; this knows nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from vlmchat.errors import ModelNotFound, NoWorker, VlmchatError, WorkerFailed
from vlmchat.server.outgoing import Answer, Readable, read
from vlmchat.server.registry import Lease, Worker

logger = logging.getLogger(__name__)

Item = dict[str, Any]

_POLL_S = 0.1  # between looks for a worker, while there is none
_READ_AHEAD = 16  # pieces of a worker's answer that wait for a slow client
# What a worker says when another one may do better.
ELSEWHERE = frozenset(
    {"engine_dead", "unavailable", "overloaded", "worker_failed", "no_worker"}
    | {"network", "internal", "out_of_memory"}
)
_ELSEWHERE_STATUS = (429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a worker may take, in seconds, and how many may be lost.

    silence_s: without a byte, then it is asked whether it is there, and has alive_s to answer.
    first_token_s: until its first token, waiting and prefill included. token_s: between tokens.
    patience_s: how long a request waits for a worker where there is none.
    max_losses: workers lost one after the other without a new token, then the request is given up:
    it may be what kills them.
    """

    silence_s: float = 3.0
    alive_s: float = 5.0
    first_token_s: float = 600.0
    token_s: float = 60.0
    patience_s: float = 20.0
    max_losses: int = 5


class WorkerLost(Exception):
    """This worker will not bring the answer to its end; another one may.

    suspect: it is to get no more requests until it has answered a probe.
    """

    def __init__(self, reason: str, suspect: bool = True) -> None:
        self.suspect = suspect
        super().__init__(reason)


class Refusal(Exception):
    """What a worker said in place of an answer, for the client as it stands."""

    def __init__(self, status: int, error: Item, retry_after: str | None = None) -> None:
        self.status, self.error, self.retry_after = status, error, retry_after
        super().__init__(str(error.get("message")))

    @property
    def elsewhere(self) -> bool:
        """Whether another worker may say otherwise."""
        return self.status in _ELSEWHERE_STATUS


class Wire(Protocol):
    """What one request has had of its answer, in one protocol's terms."""

    done: bool
    begun: bool  # something of the answer has gone to the client
    usage: Any  # OpenAI's object of token counts, where the worker tells it

    def fits(self, worker: Worker) -> bool:
        """Whether the worker speaks this."""

    def request(self, worker: Worker) -> tuple[str, Item]:
        """Path and body that make the worker begin, or go on from what was sent."""

    def feed(self, chunk: bytes) -> Iterator[Item]:
        """What is new for the client, noted as it is taken. Raises WorkerLost, Refusal."""

    def end(self) -> Iterator[Item]:
        """The same, once the worker's answer has ended in good order."""


class Pool(Protocol):
    """Who can be asked: see `Registry`, of which these are methods."""

    def lease(
        self,
        model: str,
        prefixes: Sequence[str],
        avoid: Collection[tuple[str, int]],
        fits: Callable[[Worker], bool],
    ) -> Lease | None: ...
    def serving(self, model: str) -> list[Worker]: ...
    def knows(self, model: str) -> bool: ...
    def models(self) -> list[str]: ...


class Way(Protocol):
    """How they are asked: see `Outgoing`, of which these are methods."""

    def stream(
        self, url: str, body: Any, headers: Mapping[str, str]
    ) -> AbstractAsyncContextManager[Readable]: ...
    async def post(self, url: str, body: Any, timeout_s: float) -> Answer: ...


class Relay:
    """One request's way through the workers."""

    def __init__(
        self,
        registry: Pool,
        outgoing: Way,
        limits: Limits,
        wire: Wire,
        model: str,
        prefixes: Sequence[str] = (),
        headers: dict[str, str] | None = None,
        graced_until: float = 0.0,
    ) -> None:
        """graced_until: on the clock of `time.monotonic`; until then models that are not known
        are waited for: a controller that has just started hears of its workers by and by.
        """
        self._registry, self._outgoing, self._limits = registry, outgoing, limits
        self._wire, self._model, self._prefixes = wire, model, prefixes
        self._headers = headers or {}
        self._graced_until = graced_until
        self._refusal: Refusal | None = None
        self._stuck_since: float | None = None  # no worker, or only such as refuse
        self.workers: list[str] = []  # whom it was given to, in order
        self.losses: list[str] = []  # why they were lost

    async def items(self) -> AsyncGenerator[Item, None]:
        """The answer's parts for the client, each once.

        Raises ModelNotFound, NoWorker, WorkerFailed, Refusal.
        """
        avoid: set[tuple[str, int]] = set()
        busy: set[tuple[str, int]] = set()  # those that refused; they may think better of it
        in_a_row = 0
        while not self._wire.done:
            with await self._lease(avoid, busy) as lease:
                worker = lease.worker
                known = (worker.name, worker.epoch)
                self.workers.append(worker.name)
                try:
                    async with aclosing(self._attempt(worker)) as parts:
                        async for item in parts:
                            in_a_row, self._stuck_since = 0, None
                            yield item
                    worker.note_usage(self._wire.usage)
                    continue
                except Refusal as refusal:
                    if not refusal.elsewhere:
                        raise
                    self._refusal = refusal
                    busy.add(known)
                    reason = f"{refusal.status} {refusal.error.get('code')}"
                except WorkerLost as lost:
                    if lost.suspect and worker.epoch == known[1]:
                        worker.fail(str(lost))
                    avoid.add(known)
                    busy.clear()
                    self._stuck_since = None
                    in_a_row += 1
                    reason = str(lost)
            self.losses.append(f"{worker.name}: {reason}")
            logger.warning("worker %s lost: %s", worker.name, reason)
            if in_a_row > self._limits.max_losses:
                raise WorkerFailed(f"{in_a_row} workers failed one after the other; last: {reason}")

    async def _lease(self, avoid: set[tuple[str, int]], busy: set[tuple[str, int]]) -> Lease:
        """A worker, waiting for one that is on its way back."""
        while True:
            lease = self._registry.lease(self._model, self._prefixes, avoid | busy, self._wire.fits)
            if lease is not None:
                return lease
            if self._refusal is not None and busy and not self._wire.begun:
                raise self._refusal
            busy.clear()  # in mid-answer one does not take no for an answer
            now = time.monotonic()
            self._stuck_since = self._stuck_since or now
            self._expect_worker(graced=now < self._graced_until)
            if now - self._stuck_since > self._limits.patience_s:
                raise NoWorker(
                    f"no worker for {self._model[:200]} came within {self._limits.patience_s:g} s"
                    + (f"; last: {self.losses[-1]}" if self.losses else "")
                )
            await asyncio.sleep(_POLL_S)

    def _expect_worker(self, graced: bool) -> None:
        """Raises ModelNotFound when waiting for a worker is in vain."""
        model, serving = self._model[:200], self._registry.serving(self._model)
        if serving and not any(self._wire.fits(worker) for worker in serving):
            raise ModelNotFound(f"{model} is served on LLaVA's own wire only, by its own workers")
        if not graced and not self._registry.knows(self._model):
            known = ", ".join(self._registry.models()) or "none"
            raise ModelNotFound(f"no worker serves {model}; served are: {known}")

    async def _attempt(self, worker: Worker) -> AsyncGenerator[Item, None]:
        """What this worker brings. Raises WorkerLost, Refusal."""
        path, body = self._wire.request(worker)
        pieces: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(_READ_AHEAD)
        reader = asyncio.create_task(self._read(worker.name + path, body, pieces))
        last_token, limit_s = time.monotonic(), self._limits.first_token_s
        try:
            while True:
                piece = await self._next(worker, reader, pieces, last_token + limit_s)
                for item in self._wire.end() if piece is None else self._wire.feed(piece):
                    last_token, limit_s = time.monotonic(), self._limits.token_s
                    worker.last_token = last_token
                    yield item
                if piece is None or self._wire.done:
                    return
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader

    async def _read(
        self, url: str, body: Item, pieces: asyncio.Queue[bytes | Exception | None]
    ) -> None:
        """The worker's answer, piece by piece, then None; or the exception that ended it."""
        end: Exception | None = None
        try:
            async with self._outgoing.stream(url, body, self._headers) as response:
                if response.status != 200:
                    raise _refusal(await read(response))
                async for chunk in response.aiter_stream():
                    await pieces.put(chunk)
        except (Refusal, VlmchatError) as error:
            end = error
        await pieces.put(end)

    async def _next(
        self,
        worker: Worker,
        reader: asyncio.Task[None],
        pieces: asyncio.Queue[bytes | Exception | None],
        deadline: float,
    ) -> bytes | None:
        """The next piece, asking in silences whether the worker is there."""
        while True:
            try:
                async with asyncio.timeout(self._limits.silence_s):
                    piece = await pieces.get()
            except TimeoutError:
                if not pieces.empty():
                    continue
                if reader.done():  # by an exception that nobody foresaw
                    raise WorkerLost(f"could not be read: {reader.exception()!r}") from None
                if time.monotonic() > deadline:
                    raise WorkerLost("sent no token in time") from None
                if not await self._alive(worker) and pieces.empty():
                    raise WorkerLost("does not answer any more") from None
                continue
            if isinstance(piece, Refusal):
                raise piece
            if isinstance(piece, bytes) and time.monotonic() > deadline:  # pings only
                raise WorkerLost("sent no token in time")
            if isinstance(piece, Exception):
                raise WorkerLost(str(piece))
            return piece

    async def _alive(self, worker: Worker) -> bool:
        url = f"{worker.name}/worker_get_status"
        try:
            answer = await self._outgoing.post(url, None, self._limits.alive_s)
        except VlmchatError:
            return False
        return answer.status == 200


def _refusal(answer: Answer) -> Refusal:
    """A worker's answer that is none, as OpenAI's error object."""
    body = answer.json()
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        error = {
            "message": f"the worker answered {answer.status}",
            "type": "server_error" if answer.status >= 500 else "invalid_request_error",
            "param": None,
            "code": "worker_failed",
        }
    return Refusal(answer.status, error, answer.headers.get("retry-after"))
