"""Which of several workers gets a request: lottery, shortest queue, or where its beginning lies.

Called by the registry alone, with the workers that can take the request. Plain Python: no I/O, no
clock; randomness is handed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Literal, Protocol, TypeVar

DispatchMethod = Literal["lottery", "shortest_queue", "cache_aware"]
# How much longer a queue may be than the shortest one before a known beginning is left behind.
CACHE_MARGIN = 4

_LEAST_SPEED = 1e-4  # LLaVA's controller: below this sum of speeds the lottery has no winner
_HASH_DIGITS = 16
_TEXT_STEP = 512  # characters of a finished prompt for each hash


class Candidate(Protocol):
    """A worker, as far as the choice goes."""

    @property
    def speed(self) -> float:
        """How many requests it serves at a time, as it says itself."""

    @property
    def queue_length(self) -> int:
        """Requests that it runs or that wait there."""

    def known(self, prefixes: Sequence[str]) -> int:
        """How many of the request's `prefixes`, from the first on, it has seen."""


Worker = TypeVar("Worker", bound=Candidate)
Choose = Callable[[Sequence[Worker], Sequence[str]], Worker | None]


def chooser(method: DispatchMethod, random: Random, margin: int = CACHE_MARGIN) -> Choose[Any]:
    """choose(workers in order of registration, the request's prefixes) -> a worker, or None."""
    if method == "lottery":
        return lambda workers, prefixes: lottery(workers, random)
    if method == "shortest_queue":
        return lambda workers, prefixes: shortest_queue(workers)
    return lambda workers, prefixes: cache_aware(workers, prefixes, margin)


def lottery(workers: Sequence[Worker], random: Random) -> Worker | None:
    """One at random, in proportion to speed; None when the speeds add up to nothing."""
    speeds = [max(0.0, worker.speed) for worker in workers]
    if sum(speeds) < _LEAST_SPEED:
        return None
    return random.choices(workers, weights=speeds)[0]


def shortest_queue(workers: Sequence[Worker]) -> Worker | None:
    """The first with the least queue for its speed; None when there is no worker."""
    return min(workers, key=_load, default=None)


def cache_aware(workers: Sequence[Worker], prefixes: Sequence[str], margin: int) -> Worker | None:
    """The worker that knows most of the prefixes, by shortest queue where several do.

    Unless its queue is more than `margin` requests longer than the shortest one: then that one.
    """
    shortest = shortest_queue(workers)
    if shortest is None:
        return None
    most = max(worker.known(prefixes) for worker in workers)
    best = shortest_queue([worker for worker in workers if worker.known(prefixes) == most])
    if best is None or best.queue_length > shortest.queue_length + margin:
        return shortest
    return best


def _load(worker: Candidate) -> float:
    return worker.queue_length / worker.speed if worker.speed > 0 else float("inf")


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
