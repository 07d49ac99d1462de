"""Decide what the engine's next step does: who is let in, who is prefilled, who decodes.

Called by the engine loop only. Plain Python: no torch, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vlmchat.engine.prefix_cache import PrefixCache
from vlmchat.engine.sequence import ImageSpan, Sequence
from vlmchat.request import FinishReason, Load

# A part of a prompt may be so many times longer while nobody waits for the next token.
_ALONE = 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Work on one sequence's prompt: a picture to encode, or else positions start..stop-1.

    copy: (slot, length) of what must be copied from another sequence before.
    """

    sequence: Sequence
    picture: ImageSpan | None = None
    start: int = 0
    stop: int = 0
    copy: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: at most one part of one prompt, and all that decode."""

    prefill: Chunk | None
    decode: tuple[Sequence, ...]


class Scheduler:
    """First come, first served; a sequence gets its slot when its prompt's turn has come.

    So a prompt that begins like one computed just before finds it in a slot, and copies it, also
    where both were asked at the same moment.
    """

    def __init__(
        self, cache: PrefixCache, max_num_batched_tokens: int, *, splits_pictures: bool
    ) -> None:
        self._cache = cache
        self._max_num_batched_tokens = max_num_batched_tokens
        self._splits_pictures = splits_pictures
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []  # with a slot; at most one is not prefilled yet
        self._prompt_tokens = self._cached_tokens = self._images = 0

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not (self._waiting or self._running)

    def load(self) -> Load:
        """What goes on and what was admitted. From any thread."""
        waiting = [s for s in tuple(self._waiting) if not s.finished]
        running = [s for s in tuple(self._running) if not s.finished]
        return Load(
            running=len(running),
            waiting=len(waiting),
            waiting_tokens=sum(
                len(s.prefix.ids) - s.num_computed for s in (*waiting, *running) if not s.prefilled
            ),
            slots=self._cache.num_slots,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            images=self._images,
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._waiting.append(sequence)

    def schedule(self) -> Step:
        """The next step. Cancelled sequences end here, before any work is done for them."""
        for sequence in (*self._waiting, *self._running):
            if sequence.cancelled:
                sequence.finish(FinishReason.CANCELLED)
        self.reap()
        decode = tuple(s for s in self._running if s.prefilled)
        return Step(self._next_chunk(alone=not decode), decode)

    def computed(self, sequence: Sequence, num_computed: int) -> None:
        """So many positions of a running sequence have their keys and values now."""
        sequence.num_computed = num_computed
        self._cache.computed(sequence.slot, min(num_computed, len(sequence.prefix.ids)))

    def reap(self) -> None:
        """Take finished sequences out and give their slots back, prefix kept."""
        self._waiting = [s for s in self._waiting if not s.finished]
        for sequence in [s for s in self._running if s.finished]:
            self._release(sequence, sequence.computed_match_ids)

    def abandon(self, error: Exception) -> None:
        """Fail everything: the engine cannot go on."""
        for sequence in (*self._waiting, *self._running):
            sequence.fail(error)
        self.reap()

    def drop(self, sequence: Sequence, error: Exception) -> None:
        """Fail one running sequence whose keys and values can no longer be trusted."""
        sequence.fail(error)
        self._release(sequence, ())

    def _release(self, sequence: Sequence, match_ids: tuple[int, ...]) -> None:
        self._running.remove(sequence)
        self._cache.release(sequence.slot, match_ids)

    def _next_chunk(self, *, alone: bool) -> Chunk | None:
        """The next work on the prompt whose turn it is. alone: no answer waits for its end."""
        copy = None
        sequence = next((s for s in self._running if not s.prefilled), None)
        if sequence is None:
            if not self._waiting or (admitted := self._admit(self._waiting[0])) is None:
                return None
            sequence, copy = admitted
        length = self._max_num_batched_tokens * (_ALONE if alone else 1)
        start, prefix = sequence.num_computed, sequence.prefix
        stop = prefix.part(start, length, splits_pictures=self._splits_pictures)
        for number, span in enumerate(prefix.images):
            if number >= sequence.num_encoded and start < span.stop and span.start < stop:
                sequence.num_encoded = number + 1
                return Chunk(sequence, span, copy=copy)
        return Chunk(sequence, None, start, stop, copy)

    def _admit(self, sequence: Sequence) -> tuple[Sequence, tuple[int, int] | None] | None:
        """Give the sequence a slot. What must be copied there; None: no slot is free."""
        prefix = sequence.prefix
        cut = partial(prefix.cut, splits_pictures=self._splits_pictures)
        lease = self._cache.acquire(prefix.match_ids, cut if prefix.reusable else _nothing)
        if lease is None:
            return None
        self._waiting.remove(sequence)
        self._running.append(sequence)
        sequence.slot = lease.slot
        sequence.num_cached = sequence.num_computed = lease.num_cached
        self._prompt_tokens += len(sequence.prompt.ids)
        self._cached_tokens += min(lease.num_cached, len(sequence.prompt.ids))
        self._images += len(sequence.prompt.images)
        return sequence, None if lease.copy_from is None else (lease.copy_from, lease.num_cached)


def _nothing(length: int) -> int:
    return 0
