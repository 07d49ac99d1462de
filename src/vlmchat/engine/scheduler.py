"""Decide what the engine's next step does: who is let in, who is prefilled, who decodes.

Called by the engine loop only. Plain Python: no torch, no I/O.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from vlmchat.engine.prefix_cache import PrefixCache
from vlmchat.engine.sequence import Sequence
from vlmchat.request import FinishReason


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: at most one sequence to prefill, and all that decode one token each."""

    prefill: Sequence | None
    decode: tuple[Sequence, ...]


class Scheduler:
    """First come, first served; a sequence that waits gets the best free slot."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not (self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._waiting.append(sequence)

    def schedule(self) -> Step:
        """The next step. Cancelled sequences end here, before any work is done for them."""
        for sequence in (*self._waiting, *self._running):
            if sequence.cancelled:
                sequence.finish(FinishReason.CANCELLED)
        self.reap()
        decode = tuple(self._running)
        prefill = self._admit()
        return Step(prefill, decode)

    def reap(self) -> None:
        """Take finished sequences out and give their slots back, prefix kept."""
        self._waiting = deque(s for s in self._waiting if not s.finished)
        for sequence in [s for s in self._running if s.finished]:
            self._running.remove(sequence)
            self._cache.release(sequence.slot, sequence.computed_match_ids)

    def abandon(self, error: Exception) -> None:
        """Fail everything: the engine cannot go on."""
        for sequence in (*self._waiting, *self._running):
            sequence.fail(error)
        self.reap()

    def drop(self, sequence: Sequence, error: Exception) -> None:
        """Fail one running sequence whose keys and values can no longer be trusted."""
        sequence.fail(error)
        self._running.remove(sequence)
        self._cache.release(sequence.slot, ())

    def _admit(self) -> Sequence | None:
        if not self._waiting:
            return None
        lease = self._cache.acquire(self._waiting[0].prompt.match_ids)
        if lease is None:
            return None
        sequence = self._waiting.popleft()
        sequence.slot = lease.slot
        sequence.num_cached = sequence.prompt.resume_point(lease.num_cached)
        self._running.append(sequence)
        return sequence
