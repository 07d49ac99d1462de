"""Choose a slot for each sequence and remember which tokens its keys and values stand for.

Called by the scheduler only. Plain Python: no torch, no I/O, no clock but a counter.
Knows nothing of pictures: they are already folded into match ids.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """A slot on loan: its first `num_cached` positions already hold the prompt's."""

    slot: int
    num_cached: int


class PrefixCache:
    """The slots and their match ids. A free slot keeps its tokens until it is given to another."""

    def __init__(self, num_slots: int) -> None:
        self._tokens: list[tuple[int, ...]] = [()] * num_slots
        self._last_used = [0] * num_slots
        self._busy = [False] * num_slots
        self._clock = 0

    def acquire(self, match_ids: Tokens[int]) -> Lease | None:
        """The free slot that shares the longest prefix, the least recently used among equals.

        At least the prompt's last token is left to compute, since its logits are needed.
        None when every slot is busy.
        """
        free = [slot for slot, busy in enumerate(self._busy) if not busy]
        if not free:
            return None
        usable = match_ids[:-1]
        shared = {slot: _common_prefix(self._tokens[slot], usable) for slot in free}
        slot = max(free, key=lambda s: (shared[s], -self._last_used[s]))
        self._busy[slot] = True
        return Lease(slot, shared[slot])

    def release(self, slot: int, match_ids: Tokens[int]) -> None:
        """Give a slot back; its first len(match_ids) positions hold these tokens."""
        self._clock += 1
        self._tokens[slot] = tuple(match_ids)
        self._last_used[slot] = self._clock
        self._busy[slot] = False


def _common_prefix(a: Tokens[int], b: Tokens[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
