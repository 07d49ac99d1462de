"""Which of several workers gets a request: lottery, shortest queue, or where its beginning lies.

Called by the registry alone, which keeps a `Pool` for each model: so ordered that a choice among a
thousand workers need not look at each. Plain Python: no I/O, no clock; randomness is handed in.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import accumulate
from random import Random
from typing import Any, Generic, Literal, Protocol, TypeVar

DispatchMethod = Literal["lottery", "shortest_queue", "cache_aware"]
# How much longer a queue may be than the shortest one before a known beginning is left behind.
CACHE_MARGIN = 4

_LEAST_SPEED = 1e-4  # LLaVA's controller: below this sum of speeds the lottery has no winner
_DRAWS = 8  # of the lottery, before those that cannot take the request are left out of it
_HASH_DIGITS = 16
_TEXT_STEP = 512  # characters of a finished prompt for each hash


class Candidate(Protocol):
    """A worker, as far as the choice goes."""

    place: int  # in the order of registration; no two have the same

    @property
    def speed(self) -> float:
        """How many requests it serves at a time, as it says itself."""

    @property
    def queue_length(self) -> int:
        """Requests that it runs or that wait there."""

    @property
    def prefixes(self) -> Container[str]:
        """Beginnings of requests that it has seen."""


Worker = TypeVar("Worker", bound=Candidate)
Able = Callable[[Worker], bool]


class Pool(Generic[Worker]):
    """The workers that have one model.

    Whoever changes a worker's queue says `moved`; its speed, `add`. holders: of each prefix, the
    workers that have seen it, also those of other pools. able(worker), of each method: whether it
    can take the request.
    """

    def __init__(self, holders: Mapping[str, Sequence[Worker]]) -> None:
        self._holders = holders
        self._workers: dict[int, Worker] = {}
        self._order: list[tuple[float, int]] = []  # a heap of (load, place); some have moved on
        self._speeds: list[float] | None = None  # sums of them, as far as each worker

    def __len__(self) -> int:
        return len(self._workers)

    def add(self, worker: Worker) -> None:
        """Take a worker in, or its new speed."""
        self._workers[worker.place] = worker
        self._speeds = None
        self.moved(worker)

    def discard(self, worker: Worker) -> None:
        """Leave a worker out."""
        self._workers.pop(worker.place, None)
        self._speeds = None

    def moved(self, worker: Worker) -> None:
        """Its queue is another."""
        if worker.place not in self._workers:
            return
        heapq.heappush(self._order, _rank(worker))
        if len(self._order) > 4 * len(self._workers) + 16:
            self._order = [_rank(each) for each in self._workers.values()]
            heapq.heapify(self._order)

    def shortest(self, able: Able[Worker]) -> Worker | None:
        """The first with the least queue for its speed; None when nobody is able."""
        passed: list[tuple[float, int]] = []
        found = None
        while self._order and found is None:
            rank = self._order[0]
            worker = self._workers.get(rank[1])
            holds = worker is not None and _rank(worker) == rank
            if worker is not None and holds and able(worker):
                found = worker
                continue
            heapq.heappop(self._order)
            if holds and passed[-1:] != [rank]:
                passed.append(rank)
        for rank in passed:
            heapq.heappush(self._order, rank)
        return found

    def holder(self, prefix: str, able: Able[Worker]) -> Worker | None:
        """The same of those that have seen `prefix`."""
        return min(filter(able, self._holders.get(prefix, ())), key=_rank, default=None)

    def drawn(self, random: Random, able: Able[Worker]) -> Worker | None:
        """One at random, in proportion to speed; None when the speeds add up to nothing."""
        workers = list(self._workers.values())
        if self._speeds is None:
            self._speeds = list(accumulate(max(0.0, worker.speed) for worker in workers))
        for _ in range(_DRAWS):
            if not workers or self._speeds[-1] < _LEAST_SPEED:
                return None
            worker = random.choices(workers, cum_weights=self._speeds)[0]
            if able(worker):
                return worker
        rest = list(filter(able, workers))
        speeds = [max(0.0, worker.speed) for worker in rest]
        return random.choices(rest, speeds)[0] if sum(speeds) >= _LEAST_SPEED else None


Choose = Callable[[Pool[Worker], Sequence[str], Able[Worker]], Worker | None]


def chooser(method: DispatchMethod, random: Random, margin: int = CACHE_MARGIN) -> Choose[Any]:
    """choose(the model's workers, the request's prefixes, who is able) -> a worker, or None."""
    if method == "lottery":
        return lambda pool, prefixes, able: pool.drawn(random, able)
    if method == "shortest_queue":
        return lambda pool, prefixes, able: pool.shortest(able)
    return lambda pool, prefixes, able: cache_aware(pool, prefixes, able, margin)


def cache_aware(
    pool: Pool[Worker], prefixes: Sequence[str], able: Able[Worker], margin: int
) -> Worker | None:
    """The worker that knows most of the prefixes, by shortest queue where several do.

    Unless its queue is more than `margin` requests longer than the shortest one: then that one.
    """
    shortest = pool.shortest(able)
    if shortest is None:
        return None
    for prefix in reversed(prefixes):
        if prefix in shortest.prefixes:
            return shortest  # whoever else has seen it has no shorter queue
        best = pool.holder(prefix, able)
        if best is not None:
            near = best.queue_length <= shortest.queue_length + margin
            return best if near else shortest
    return shortest


def _rank(worker: Candidate) -> tuple[float, int]:
    speed = worker.speed
    return worker.queue_length / speed if speed > 0 else float("inf"), worker.place


def prefix_hashes(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """One hash for each message of an OpenAI request, of all that was said up to its end.

    Pictures count by the sha256 of their address as it is given. Never raises: what is no message
    hashes as it stands.
    """
    running = hashlib.sha256()
    found = []
    for message in messages:
        part = message if isinstance(message, Mapping) else {"content": message}
        running.update(json.dumps([part.get("role"), *_said(part.get("content"))]).encode())
        found.append(running.hexdigest()[:_HASH_DIGITS])
    return tuple(found)


def _said(content: Any) -> list[str]:
    """Texts as they are, pictures as digests, anything else as JSON."""
    said = []
    for part in content if isinstance(content, list) else [content]:
        image = part.get("image_url") if isinstance(part, Mapping) else None
        url = image.get("url") if isinstance(image, Mapping) else image
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            said.append(part["text"])
        elif isinstance(url, str):
            said.append(hashlib.sha256(url.encode("utf-8", "replace")).hexdigest())
        else:
            said.append(part if isinstance(part, str) else json.dumps(part, default=str))
    return said


def text_hashes(prompt: str, images: Sequence[str]) -> tuple[str, ...]:
    """The same for a finished prompt with its pictures in base64: one for each 512 characters."""
    running = hashlib.sha256()
    for image in images:
        running.update(hashlib.sha256(image.encode("utf-8", "replace")).digest())
    found = []
    for start in range(0, len(prompt), _TEXT_STEP):
        running.update(prompt[start : start + _TEXT_STEP].encode("utf-8", "replace"))
        found.append(running.hexdigest()[:_HASH_DIGITS])
    return tuple(found)
