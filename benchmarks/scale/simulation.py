"""The discrete-event loop: conversations ask, the real registry says whom, workers answer in time.

Called by the command and the tests. All chance comes from one seed, all time from the events: the
same plan gives the same result, but for what C libraries compute differently in the last digit.
"""

from __future__ import annotations

import heapq
from array import array
from dataclasses import dataclass, field
from random import Random

from benchmarks.scale.profiles import People, Profile, engine_s
from benchmarks.scale.worker import Engine, Session, Turn
from vlmchat.server.dispatch import CACHE_MARGIN, DispatchMethod, chooser
from vlmchat.server.heartbeat import INTERVAL_S
from vlmchat.server.registry import Lease, Registry, WorkerStatus

MODEL = "m"
BEAT_S = 0.010  # from a change of a worker's queue until its controller knows: a guess
WARM_S = 300.0  # until as many conversations end as begin, nothing is measured
RETRY_S = 5.0  # a client whom everybody has refused asks again
_ARRIVE, _ASK, _WORK, _BEAT, _INTERVAL = range(5)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated.

    load: share of what the workers could do if nothing were cached. margin: of cache_aware.
    controllers: every worker beats to each. sticky: a conversation stays with one of them; else
    each of its requests comes to any.
    """

    workers: int
    sessions: int
    profile: Profile
    policy: DispatchMethod = "cache_aware"
    load: float = 0.8
    seed: int = 1
    people: People = field(default_factory=People)
    margin: int = CACHE_MARGIN
    controllers: int = 1
    sticky: bool = True


@dataclass(slots=True)
class Counted:
    """What was seen. All but asked, answered, refused and left is of the time in the middle.

    That is while conversations still arrive, the first tenth of them and WARM_S left out. seconds:
    0 where nothing of it remains. queues[n]: how often a worker, looked at every 15 s, had n
    requests. left: requests under way at the end.
    """

    asked: int = 0
    answered: int = 0
    refused: int = 0
    left: int = 0
    seconds: float = 0.0
    turns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    beats: int = 0
    first_s: array[float] = field(default_factory=lambda: array("d"))
    queues: dict[int, int] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were cached."""
        return self.cached_tokens / max(1, self.prompt_tokens)

    def first_token_s(self, *shares: float) -> tuple[float, ...]:
        """Percentiles of the time to the first token; nan where there was none."""
        ordered = sorted(self.first_s)
        return tuple(_at(ordered, share) for share in shares)

    def queue_length(self, *shares: float) -> tuple[float, ...]:
        """Percentiles of the workers' queue lengths."""
        ordered = [n for n in sorted(self.queues) for _ in range(self.queues[n])]
        return tuple(_at([float(n) for n in ordered], share) for share in shares)


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class Simulation:
    """One plan's run."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.counted = plan, Counted()
        self._random = Random(plan.seed)
        self._now = 0.0
        self._events: list[tuple[float, int, int, object, int]] = []
        self._count = 0
        self._arrived = 0
        self._going = 0  # conversations that have not ended
        self._measuring = False
        self._since = 0.0
        people = plan.people
        turns_s = plan.load * plan.workers / engine_s(plan.profile, people)
        self._arrivals_s = turns_s / _mean_turns(people)
        self.engines = [Engine(f"w{n}", plan.profile) for n in range(plan.workers)]
        self._by_name = {engine.name: engine for engine in self.engines}
        self._beating = [False] * plan.workers
        self._index = {engine.name: n for n, engine in enumerate(self.engines)}
        self.registries = [
            Registry(chooser(plan.policy, Random(plan.seed + n), plan.margin), lambda: self._now)
            for n in range(plan.controllers)
        ]
        for engine in self.engines:
            status = WorkerStatus((MODEL,), 1, 0, {"openai": True})
            for registry in self.registries:
                registry.register(engine.name, True, status)

    def run(self) -> Counted:
        """Until every conversation has ended."""
        self._push(self._random.expovariate(self._arrivals_s), _ARRIVE)
        for n in range(len(self.engines)):
            self._push(INTERVAL_S * (n + 1) / len(self.engines), _INTERVAL, n)
        while self._going or self._arrived < self.plan.sessions:
            self._now, _, kind, what, version = heapq.heappop(self._events)
            if kind == _WORK:
                assert isinstance(what, Engine)
                if what.version == version:
                    self._work(what)
            elif kind == _ASK:
                assert isinstance(what, Turn)
                self._ask(what)
            elif kind == _ARRIVE:
                self._arrive()
            else:
                assert isinstance(what, int)
                self._beat(what, regular=kind == _INTERVAL)
        self.counted.left = sum(engine.queue_length for engine in self.engines) + sum(
            worker.leases for registry in self.registries for worker in registry.workers
        )
        return self.counted

    def _push(self, time: float, kind: int, what: object = None, version: int = 0) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, kind, what, version))

    def _arrive(self) -> None:
        plan, people, random = self.plan, self.plan.people, self._random
        self._arrived += 1
        self._going += 1
        warm = self._arrived > plan.sessions // 10 and self._now >= WARM_S
        if warm and not self._measuring:
            self._measuring, self._since = True, self._now
        session = Session(
            self._arrived,
            people.draw_picture(random),
            people.draw_turns(random),
            people.system_tokens + people.picture_tokens,
            people.system_tokens,
            people.picture_tokens,
            ("system",),
            random.randrange(plan.controllers),
        )
        self._ask(self._next_turn(session))
        if self._arrived < plan.sessions:
            self._push(self._now + random.expovariate(self._arrivals_s), _ARRIVE)
        elif self._measuring:
            self._measuring = False
            self.counted.seconds = self._now - self._since

    def _next_turn(self, session: Session) -> Turn:
        """With its hashes: one for the answer before, one for the question."""
        people, random = self.plan.people, self._random
        session.turns_left -= 1
        session.tokens += people.draw_question(random)
        done = len(session.prefixes)
        session.prefixes += tuple(
            f"{session.number:011x}.{n:04x}" for n in range(done, done + (2 if done > 1 else 1))
        )
        if not self.plan.sticky:
            session.controller = random.randrange(self.plan.controllers)
        self.counted.asked += 1
        return Turn(session, session.tokens, people.draw_answer(random), self._now)

    def _ask(self, turn: Turn) -> None:
        """Give the turn to a worker, past those that refuse."""
        registry = self.registries[turn.session.controller]
        avoid: set[tuple[str, int]] = set()
        if not turn.measured:
            turn.asked_at, turn.measured = self._now, True
        while True:
            lease = registry.lease(MODEL, turn.session.prefixes, avoid)
            if lease is None:
                self.counted.refused += 1
                self._push(self._now + RETRY_S, _ASK, turn)
                return
            engine = self._by_name[lease.worker.name]
            if not engine.full:
                break
            lease.give_back()
            avoid.add((lease.worker.name, lease.worker.epoch))
        turn.lease = lease
        engine.advance(self._now)
        version = engine.version
        engine.ask(turn)
        self._changed(engine, version)

    def _work(self, engine: Engine) -> None:
        """A prompt or an answer ends there."""
        engine.advance(self._now)
        turn, ended = engine.happen()
        if ended:
            self._ended(turn)
            self._changed(engine, -1)
        else:
            self._push(engine.due(), _WORK, engine, engine.version)
            self._begun(turn)

    def _changed(self, engine: Engine, version: int) -> None:
        """Its queue is another: it beats. Its next event is another, unless its version is not."""
        if engine.version != version:
            due = engine.due()
            if due != float("inf"):
                self._push(due, _WORK, engine, engine.version)
        n = self._index[engine.name]
        if not self._beating[n]:
            self._beating[n] = True
            self._push(self._now + BEAT_S, _BEAT, n)

    def _begun(self, turn: Turn) -> None:
        """Its first token is there."""
        if self._measuring and turn.asked_at >= self._since:
            counted = self.counted
            counted.turns += 1
            counted.first_s.append(self._now - turn.asked_at)
            counted.prompt_tokens += turn.prompt
            counted.cached_tokens += turn.cached
            counted.answer_tokens += turn.answer

    def _ended(self, turn: Turn) -> None:
        assert isinstance(turn.lease, Lease)
        turn.lease.give_back()
        self.counted.answered += 1
        session = turn.session
        session.tokens += turn.answer
        if session.turns_left:
            think_s = self.plan.people.draw_think_s(self._random)
            self._push(self._now + think_s, _ASK, self._next_turn(session))
        else:
            self._going -= 1

    def _beat(self, n: int, regular: bool) -> None:
        """What a worker says to every controller, at once when its queue has changed."""
        engine, counted = self.engines[n], self.counted
        ours = {"openai": True, "prefixes": list(engine.prefixes)}
        for registry in self.registries:
            registry.beat(engine.name, engine.queue_length, ours)
        if self._measuring:
            counted.beats += len(self.registries)
        if not regular:
            self._beating[n] = False
            return
        self._push(self._now + INTERVAL_S, _INTERVAL, n)
        if self._measuring:
            counted.queues[engine.queue_length] = counted.queues.get(engine.queue_length, 0) + 1


def _mean_turns(people: People) -> float:
    """Of the geometric distribution, cut at max_turns."""
    return people.turns * (1 - (1 - 1 / people.turns) ** people.max_turns)
