"""A simulated worker: a queue, prompts one after the other, answers together, slots that remember.

Driven by the simulation, which says what time it is and asks when something happens next. Follows
`engine/scheduler.py` and `engine/prefix_cache.py`; between two changes all goes on evenly, where
the engine makes whole steps. Knows no registry and no randomness.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.scale.profiles import PART_TOKENS, Profile

KEPT_PREFIXES = 64  # vlmchat.server.worker: what a beat tells
_COPY_WORTH = 16  # vlmchat.engine.prefix_cache
_NEVER = float("inf")


@dataclass(slots=True, eq=False)
class Session:
    """A conversation: who asks, of which picture, what has been said so far.

    tokens: of all prompts and answers up to here. prefixes: the request's hashes.
    """

    number: int
    picture: int | None
    turns_left: int
    tokens: int
    system_tokens: int
    picture_tokens: int
    prefixes: tuple[str, ...] = ()
    controller: int = 0

    @property
    def shared(self) -> int:
        """The most tokens that another conversation can begin with, too."""
        return self.system_tokens + self.picture_tokens


@dataclass(slots=True, eq=False)
class Turn:
    """One request. lease: its place at the registry, for whoever drives this."""

    session: Session
    prompt: int
    answer: int
    asked_at: float
    measured: bool = False  # asked_at holds
    lease: object = None
    slot: _Slot | None = None
    cached: int = 0


@dataclass(slots=True, eq=False)
class _Slot:
    """Whose keys and values lie there, and how many."""

    session: int = -1
    picture: int | None = None
    computed: int = 0
    last_used: int = 0
    busy: bool = False


class Slots:
    """`PrefixCache` over conversations in place of token ids: the same slot, the same length.

    What two prompts share is their conversation, else their popular picture, else the system
    prompt.
    """

    def __init__(self, number: int) -> None:
        self._slots = [_Slot() for _ in range(number)]
        self._own: dict[int, _Slot] = {}  # the one slot that a conversation has at most
        self._clock = 0

    def acquire(self, session: Session, prompt: int) -> tuple[_Slot, int]:
        """A slot and how many of the prompt's tokens need not be computed. One must be free."""
        own = self._own.get(session.number)
        if own is not None and not own.busy and own.computed > session.shared:
            slot, cached = own, min(own.computed, prompt - 1)
        else:
            slot, cached = self._choose(session, prompt)
        if self._own.get(slot.session) is slot:
            del self._own[slot.session]
        self._own[session.number] = slot
        slot.session, slot.picture, slot.computed = session.number, session.picture, cached
        slot.busy = True
        return slot, cached

    def release(self, slot: _Slot, computed: int) -> None:
        """Its first `computed` tokens stay there."""
        self._clock += 1
        slot.computed, slot.last_used, slot.busy = computed, self._clock, False

    def _choose(self, session: Session, prompt: int) -> tuple[_Slot, int]:
        """As `PrefixCache._choose`."""
        best, oldest, own = 0, None, None
        own_shared = -1
        for slot in self._slots:
            shared = _shared(slot, session, prompt)
            best = max(best, shared)
            if slot.busy:
                continue
            if oldest is None or slot.last_used < oldest.last_used:
                oldest = slot
            if own is None or (shared, -slot.last_used) > (own_shared, -own.last_used):
                own, own_shared = slot, shared
        assert own is not None
        assert oldest is not None
        if best < own_shared + _COPY_WORTH:
            best = own_shared
            if own is oldest or own.computed - own_shared <= own_shared:
                return own, own_shared
        return oldest, best


def _shared(slot: _Slot, session: Session, prompt: int) -> int:
    if slot.session == session.number:
        return min(slot.computed, prompt - 1)
    common = session.system_tokens
    if slot.picture is not None and slot.picture == session.picture:
        common += session.picture_tokens
    return min(slot.computed, common, prompt - 1)


@dataclass(slots=True)
class _Prefill:
    """The prompt that is computed: seconds of work left, and how many go between two tokens."""

    turn: Turn
    left_s: float
    part_s: float


class Engine:
    """One worker's time. `advance` to now before every other call; `due` says what comes next."""

    def __init__(self, name: str, profile: Profile) -> None:
        self.name, self._profile = name, profile
        self.slots = Slots(profile.slots)
        self.version = 0  # grows with every change: a time told before no longer holds
        self.refused = 0
        self._at = 0.0
        self._tokens = 0.0  # each answer under way has grown by so many since the start
        self._waiting: deque[Turn] = deque()
        self._prefill: _Prefill | None = None
        self._decoding: list[tuple[float, int, Turn]] = []  # (self._tokens at its end, …)
        self._count = 0
        self.prefixes: dict[str, None] = {}  # those seen last come last

    @property
    def queue_length(self) -> int:
        """Requests that run or wait."""
        return len(self._waiting) + len(self._decoding) + (self._prefill is not None)

    @property
    def full(self) -> bool:
        """Whether it would answer 429."""
        return self.queue_length >= self._profile.running + self._profile.waiting

    def ask(self, turn: Turn) -> None:
        """Queue a request."""
        self._waiting.append(turn)
        self._begin()

    def advance(self, now: float) -> None:
        """Let what goes on go on until `now`, before anything ends."""
        passed, self._at = now - self._at, now
        rows = len(self._decoding)
        if self._prefill is None:
            if rows:
                self._tokens += passed / self._profile.step_s(rows)
        elif not rows:
            self._prefill.left_s -= passed
        else:
            cycle_s = self._prefill.part_s + self._profile.step_s(rows)
            self._prefill.left_s -= passed * self._prefill.part_s / cycle_s
            self._tokens += passed / cycle_s

    def due(self) -> float:
        """When a prompt or an answer ends next, if nothing changes until then."""
        rows, prefill = len(self._decoding), self._prefill
        step_s = self._profile.step_s(rows) if rows else 0.0
        cycle_s = step_s + (prefill.part_s if prefill else 0.0)
        first = _NEVER
        if prefill is not None:
            first = max(0.0, prefill.left_s) * cycle_s / prefill.part_s
        if rows:
            first = min(first, max(0.0, self._decoding[0][0] - self._tokens) * cycle_s)
        return self._at + first

    def happen(self) -> tuple[Turn, bool]:
        """What was due: (a turn, whether its answer has ended; else its prompt).

        An answer of one token ends with its prompt, and is told twice.
        """
        self.version += 1
        prefill = self._prefill
        rows, step_s = len(self._decoding), self._profile.step_s(len(self._decoding))
        cycle_s = step_s + prefill.part_s if prefill else step_s
        if prefill is not None:
            end_s = prefill.left_s * (cycle_s if rows else prefill.part_s) / prefill.part_s
            if not rows or end_s <= (self._decoding[0][0] - self._tokens) * cycle_s:
                self._prefill = None
                self._count += 1
                turn = prefill.turn
                end = self._tokens + turn.answer - 1
                heapq.heappush(self._decoding, (end, self._count, turn))
                self._begin()
                return turn, False
        turn = heapq.heappop(self._decoding)[2]
        assert turn.slot is not None
        self.slots.release(turn.slot, turn.prompt + turn.answer - 1)
        self._remember(turn.session.prefixes)
        self._begin()
        return turn, True

    def _begin(self) -> None:
        """The next prompt, where there is one and room for its answer."""
        if self._prefill or not self._waiting or len(self._decoding) >= self._profile.running:
            return
        self.version += 1
        turn = self._waiting.popleft()
        turn.slot, turn.cached = self.slots.acquire(turn.session, turn.prompt)
        left_s = self._profile.prefill_s(turn.prompt - turn.cached)
        part_s = min(left_s, self._profile.prefill_s(PART_TOKENS))
        self._prefill = _Prefill(turn, left_s, part_s)

    def _remember(self, prefixes: Sequence[str]) -> None:
        for prefix in prefixes:
            self.prefixes.pop(prefix, None)
            self.prefixes[prefix] = None
        while len(self.prefixes) > KEPT_PREFIXES:
            del self.prefixes[next(iter(self.prefixes))]
