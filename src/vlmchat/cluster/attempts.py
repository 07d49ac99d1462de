"""One request's attempts at the replicas of its model.

Made by the front for each request; to `failover.Relay` it is both whom to ask and how. Which
replica it is, Ray's router decides; here it is known which ones have failed this request already,
and whether the one that answers is still there. Knows nothing of HTTP but an answer's status.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager, suppress
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from vlmchat.errors import NetworkError, Overloaded
from vlmchat.server.app import error_object
from vlmchat.server.failover import Refusal
from vlmchat.server.outgoing import Answer
from vlmchat.server.registry import Lease, Registry, Worker, WorkerStatus

ALIVE_S = 10.0  # a replica, or all of a model, that has not been heard of for so long is lost
_ANY = "a replica"  # in place of a worker's address


class _Place(Lease):
    """At whichever replica: Ray counts who asks it, so there is nothing to give back."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self._held = worker, False


class Attempts:
    """See the module. replicas: as they have told of themselves, each a worker of its model."""

    def __init__(
        self, replicas: Registry, handle: DeploymentHandle[Any], model: str, *, resumes: bool
    ) -> None:
        """resumes: whether its replicas can go on from token ids."""
        self._replicas, self._handle, self._model = replicas, handle, model
        ours = {"openai": True, "resume": resumes}
        self._any = Worker(_ANY, WorkerStatus((model,), 1, 0, ours), True, time.monotonic())
        self._prefixes: Sequence[str] = ()
        self._known = False  # which replica it is that is asked now
        self._refused = self._in_vain = False  # how the last attempt ended
        self.tried: list[str] = []  # replicas, in order

    # -- whom to ask: see `failover.Pool` ------------------------------------------------------

    def lease(
        self,
        model: str,
        prefixes: Sequence[str],
        avoid: Collection[tuple[str, int]],
        fits: Callable[[Worker], bool],
    ) -> Lease | None:
        """A place at whichever replica Ray will choose.

        None once where all have refused, and while there is none after one was waited for in vain.
        """
        self._prefixes = prefixes
        there = {worker.name for worker in self.serving(model)}
        # Ray refuses for all of them, before it is known whom it would have asked.
        full = self._refused and (not self._known or there <= set(self.tried))
        self._refused = False
        return None if full or (self._in_vain and not there) else _Place(self._any)

    def serving(self, model: str) -> list[Worker]:
        """Its replicas."""
        return self._replicas.serving(model)

    def knows(self, model: str) -> bool:
        """That it was deployed is known before it is asked for."""
        return True

    def models(self) -> list[str]:
        """Names of all models with replicas."""
        return self._replicas.models()

    # -- how to ask: see `failover.Way` --------------------------------------------------------

    @asynccontextmanager
    async def stream(
        self, url: str, body: Any, headers: Mapping[str, str]
    ) -> AsyncIterator[_Answering]:
        """POST to the path in `url`. Raises NetworkError, from reading too, and Refusal."""
        path = "/" + url.partition("/")[2]
        response = self._handle.options(method_name="answer", stream=True).remote(
            path,
            json.dumps(body).encode(),
            dict(headers),
            prefixes=self._prefixes,
            avoid=tuple(self.tried),
        )
        self._known = self._in_vain = False
        try:
            with _translated():
                self.tried.append(await anext(response))
                self._known = True
                status, raw = await anext(response)
            self._refused = status != 200
            yield _Answering(status, raw, response)
        except Refusal:
            self._refused = True
            raise
        finally:
            with suppress(RayError, RayServeException, CancelledError):  # it may have ended so
                response.cancel()

    async def post(self, url: str, body: Any, timeout_s: float) -> Answer:
        """Whether the replica under way, or before it is known any, has been heard of lately."""
        asked = self.tried[-1:] if self._known else [w.name for w in self.serving(self._model)]
        beats = [w.last_beat for w in self.serving(self._model) if w.name in asked]
        if max(beats, default=0.0) > time.monotonic() - ALIVE_S:
            return Answer(200, {}, b"")
        self._in_vain = not self._known
        raise NetworkError(f"nothing was heard of it for {ALIVE_S:g} s")


class _Answering:
    """See `outgoing.Readable`."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], response: Any) -> None:
        self.status, self.headers, self._response = status, headers, response

    async def aiter_stream(self) -> AsyncIterator[bytes]:
        """The body. Raises NetworkError."""
        with _translated():
            async for part in self._response:
                yield part


class _translated:
    """`with _translated()`: what Ray raises becomes NetworkError, or a Refusal when all is full."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, BackPressureError):
            full = Overloaded("all replicas are busy, and as many requests wait as may", 1)
            raise Refusal(429, error_object(full)["error"], "1") from error
        if isinstance(error, RayError | RayServeException | StopAsyncIteration):
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise NetworkError(f"the replica was lost: {reason}") from error
