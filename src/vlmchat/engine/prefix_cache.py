"""Choose a slot for each sequence and remember which tokens its keys and values stand for.

Called by the scheduler only. Plain Python: no torch, no I/O, no clock but a counter.
Knows nothing of pictures: they are already folded into match ids.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Positions that another slot must have beyond the best free one for a copy to be worth a step.
_COPY_WORTH = 16


@dataclass(frozen=True, slots=True)
class Lease:
    """A slot on loan, whose first `num_cached` positions hold the prompt's.

    copy_from: the slot that they must be copied from first; None: they are there already.
    """

    slot: int
    num_cached: int
    copy_from: int | None = None


@dataclass(slots=True)
class _Slot:
    """tokens: the match ids that it holds or, while busy, will hold; so many of them by now."""

    tokens: array[int] = field(default_factory=lambda: array("q"))
    num_computed: int = 0
    last_used: int = 0
    busy: bool = False


class PrefixCache:
    """The slots and their match ids. A free slot keeps its tokens until it is given to another."""

    def __init__(self, num_slots: int) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._clock = 0

    @property
    def num_slots(self) -> int:
        """Busy and free."""
        return len(self._slots)

    @property
    def num_busy(self) -> int:
        """Slots on loan."""
        return sum(slot.busy for slot in self._slots)

    def acquire(
        self, match_ids: Sequence[int], cut: Callable[[int], int] = lambda length: length
    ) -> Lease | None:
        """A free slot, with the longest prefix that any slot has of these tokens.

        At least the prompt's last token is left to compute, since its logits are needed.
        cut: the longest prefix, of at most so many tokens, that can be taken from another sequence.
        None when every slot is busy.
        """
        free = [index for index, slot in enumerate(self._slots) if not slot.busy]
        if not free:
            return None
        tokens = array("q", match_ids)
        shared = [cut(self._shared(slot, tokens)) for slot in self._slots]
        lease = self._choose(free, shared)
        taken = self._slots[lease.slot]
        taken.tokens, taken.num_computed, taken.busy = tokens, lease.num_cached, True
        return lease

    def computed(self, slot: int, length: int) -> None:
        """A busy slot now holds the first `length` tokens of its prompt: others may copy them."""
        self._slots[slot].num_computed = length

    def release(self, slot: int, match_ids: Sequence[int]) -> None:
        """Give a slot back; its first len(match_ids) positions hold these tokens."""
        self._clock += 1
        self._slots[slot] = _Slot(array("q", match_ids), len(match_ids), self._clock)

    def _choose(self, free: list[int], shared: list[int]) -> Lease:
        """The lease. shared: with each slot.

        A free slot is taken over where that destroys no more than it shares; else its prefix, or
        a busy slot's longer one, is copied into the slot that was used least recently.
        """
        own = max(free, key=lambda index: (shared[index], -self._slots[index].last_used))
        oldest = min(free, key=lambda index: self._slots[index].last_used)
        best = max(range(len(shared)), key=shared.__getitem__)
        if shared[best] < shared[own] + _COPY_WORTH:
            best = own
            destroyed = self._slots[own].num_computed - shared[own]
            if own == oldest or destroyed <= shared[own]:
                return Lease(own, shared[own])
        return Lease(oldest, shared[best], best)

    @staticmethod
    def _shared(slot: _Slot, tokens: array[int]) -> int:
        return _common_prefix(slot.tokens, tokens, max(0, min(slot.num_computed, len(tokens) - 1)))


def _common_prefix(a: array[int], b: array[int], limit: int) -> int:
    """How many of the first `limit` elements are the same, by halves: slices compare in C."""
    low, high = 0, limit
    if a[:high] == b[:high]:
        return high
    while low < high - 1:  # a[:low] is the same, a[:high] is not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
