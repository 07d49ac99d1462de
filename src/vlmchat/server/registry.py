"""The controller's memory: which workers there are, what they run, how long their queues are.

Called by the controller from its one event loop. Plain Python: no I/O; clock and choice are handed
in. What it takes in has been checked by then: a registration by a look at the worker itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any, TypeGuard

from vlmchat.errors import InvalidRequest
from vlmchat.server.dispatch import Choose, Pool

HEART_BEAT_S = 15.0  # LLaVA's worker beats so often
EXPIRY_S = 30.0  # LLaVA's controller: older beats are a dead worker's
_MAX_NAME = 512
_KEPT_PREFIXES = 4096  # of each worker: some 800 kB
_TOLD_PREFIXES = 64  # taken in from one beat
_KNOWN_FOR_S = 600.0  # a model without workers is waited for, not denied, for so long


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker says of itself: LLaVA's three fields, and `ours` where it is one of ours."""

    models: tuple[str, ...]
    speed: float
    queue_length: int
    ours: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, body: Any) -> WorkerStatus:
        """From JSON. Raises InvalidRequest, naming the field that is wrong."""
        if not isinstance(body, Mapping):
            raise InvalidRequest("worker_status is not an object")
        names, speed, queue = (body.get(k) for k in ("model_names", "speed", "queue_length"))
        if not isinstance(names, list) or not all(map(_is_name, names)):
            raise InvalidRequest("worker_status.model_names is not a list of names")
        if not _is_count(speed) or not _is_count(queue):
            raise InvalidRequest("worker_status.speed and .queue_length are not numbers from 0 on")
        ours = body.get("vlmchat")
        known = ours if isinstance(ours, Mapping) else {}
        return cls(tuple(dict.fromkeys(names)), speed, int(queue), known)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= _MAX_NAME


def _is_count(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


@dataclass(slots=True, eq=False)
class Worker:
    """One worker. Its queue is the leases held here and what others have sent it.

    place: in the order of registration. epoch: grows each time it registers or recovers; a request
    avoids one that failed it by name and epoch. others: requests at its last beat beyond those
    leased here then.
    """

    name: str
    status: WorkerStatus
    check_heart_beat: bool
    last_beat: float
    place: int = 0
    epoch: int = 0
    others: int = 0
    leases: int = 0
    healthy: bool = True
    trouble: str = ""
    last_token: float = float("-inf")
    prompt_tokens: int = 0  # of answers that ended there
    cached_tokens: int = 0
    prefixes: OrderedDict[str, None] = field(default_factory=OrderedDict)

    @property
    def speed(self) -> float:
        """As it says itself."""
        return self.status.speed

    @property
    def queue_length(self) -> int:
        """Requests that it runs or that wait there."""
        return self.leases + self.others

    @property
    def is_ours(self) -> bool:
        """Whether it speaks the OpenAI wire with our extensions."""
        return bool(self.status.ours.get("openai"))

    @property
    def resumes(self) -> bool:
        """Whether it can go on from tokens that another worker drew."""
        return self.is_ours and self.status.ours.get("resume") is not False

    def note_usage(self, usage: Any) -> None:
        """Count an answer's tokens, as OpenAI's usage object has them."""
        details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
        cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
        if isinstance(cached, int) and isinstance(usage.get("prompt_tokens"), int):
            self.prompt_tokens += usage["prompt_tokens"]
            self.cached_tokens += cached

    def fail(self, trouble: str) -> None:
        """No more requests until `recover` or a new registration."""
        self.healthy, self.trouble = False, trouble

    def recover(self) -> None:
        """It has answered again."""
        if not self.healthy:
            self.healthy, self.trouble, self.epoch = True, "", self.epoch + 1

    def report(self, queue_length: int, now: float) -> None:
        """A beat: its own count, of which the leases held here are known better."""
        self.last_beat = now
        self.others = max(0, queue_length - self.leases)


class Lease:
    """One request's place at a worker, until it is returned. A context manager."""

    def __init__(self, worker: Worker, moved: Callable[[Worker], None]) -> None:
        self.worker, self._moved = worker, moved
        self._held = True
        worker.leases += 1
        moved(worker)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Once; more often has no effect."""
        if self._held:
            self._held = False
            self.worker.leases -= 1
            self._moved(self.worker)


class Registry:
    """All workers, by name, in order of registration."""

    def __init__(
        self, choose: Choose[Worker], clock: Callable[[], float], expiry_s: float = EXPIRY_S
    ) -> None:
        self._choose = choose
        self._clock = clock
        self._expiry_s = expiry_s
        self._workers: dict[str, Worker] = {}
        self._pools: dict[str, Pool[Worker]] = {}  # by model; none is empty
        self._holders: dict[str, list[Worker]] = {}  # prefix -> who has it among its own
        self._places = count()
        self._seen: dict[str, float] = {}  # model -> when a worker had it last

    @property
    def workers(self) -> tuple[Worker, ...]:
        """In order of registration."""
        return tuple(self._workers.values())

    def models(self) -> list[str]:
        """Names of all models, each once, in order of registration."""
        return list(dict.fromkeys(n for w in self._workers.values() for n in w.status.models))

    def register(self, name: str, check_heart_beat: bool, status: WorkerStatus) -> Worker:
        """Take a worker in, or anew: its queue and its beat are what it says now."""
        now = self._clock()
        worker = self._workers.get(name)
        if worker is None:
            place = next(self._places)
            worker = self._workers[name] = Worker(name, status, check_heart_beat, now, place)
        else:
            self._leave(worker)
            if worker.status.ours.get("instance") != status.ours.get("instance"):
                self._forget_prefixes(worker)  # a new process remembers nothing
            worker.healthy, worker.trouble, worker.epoch = True, "", worker.epoch + 1
            worker.status, worker.check_heart_beat = status, check_heart_beat
        worker.report(status.queue_length, now)
        for model in status.models:
            self._pools.setdefault(model, Pool(self._holders)).add(worker)
        self._note(worker, status.ours)
        return worker

    def beat(self, name: str, queue_length: int, ours: Mapping[str, Any] | None = None) -> bool:
        """A heart beat; False: it is not known and must register again."""
        worker = self._workers.get(name)
        if worker is None:
            return False
        worker.report(queue_length, self._clock())
        if ours:
            status = worker.status
            worker.status = WorkerStatus(status.models, status.speed, queue_length, ours)
        self._moved(worker)
        self._note(worker, ours or {})
        return True

    def _note(self, worker: Worker, ours: Mapping[str, Any]) -> None:
        self._seen.update(dict.fromkeys(worker.status.models, self._clock()))
        prefixes = ours.get("prefixes")
        if isinstance(prefixes, list):
            told = [prefix for prefix in prefixes[:_TOLD_PREFIXES] if isinstance(prefix, str)]
            new = [prefix for prefix in told if prefix not in worker.prefixes]
            self._remember(worker, filter(_is_name, new))

    def _remember(self, worker: Worker, prefixes: Iterable[str]) -> None:
        """That prompts beginning so lie there; the oldest are forgotten."""
        for prefix in prefixes:
            if prefix in worker.prefixes:
                worker.prefixes.move_to_end(prefix)
            else:
                worker.prefixes[prefix] = None
                self._holders.setdefault(prefix, []).append(worker)
        while len(worker.prefixes) > _KEPT_PREFIXES:
            self._forget_oldest(worker)

    def _forget_oldest(self, worker: Worker) -> None:
        prefix, _ = worker.prefixes.popitem(last=False)
        holders = self._holders[prefix]
        holders.remove(worker)
        if not holders:
            del self._holders[prefix]

    def _forget_prefixes(self, worker: Worker) -> None:
        while worker.prefixes:
            self._forget_oldest(worker)

    def _moved(self, worker: Worker) -> None:
        for model in worker.status.models:
            if model in self._pools:
                self._pools[model].moved(worker)

    def _leave(self, worker: Worker) -> None:
        """The pools of its models."""
        for model in worker.status.models:
            self._pools[model].discard(worker)
            if not self._pools[model]:
                del self._pools[model]

    def remove(self, name: str) -> None:
        """Forget a worker."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            self._leave(worker)
            self._forget_prefixes(worker)

    def expire(self) -> list[Worker]:
        """Forget, and return, workers whose beat is checked and is too old."""
        oldest = self._clock() - self._expiry_s
        dead = [w for w in self.workers if w.check_heart_beat and w.last_beat < oldest]
        for worker in dead:
            self.remove(worker.name)
        return dead

    def serving(self, model: str) -> list[Worker]:
        """All workers that have the model, also those that are not well."""
        return [worker for worker in self.workers if model in worker.status.models]

    def knows(self, model: str) -> bool:
        """Whether a worker has the model now, or had it a short while ago."""
        return self._seen.get(model, float("-inf")) > self._clock() - _KNOWN_FOR_S

    def address(self, model: str) -> str:
        """Where a client may go by itself; "" when nowhere.

        As its end will not be told here, the request counts until the worker's next beat.
        """
        worker = self._pick(model, (), frozenset(), lambda worker: True)
        if worker is None:
            return ""
        worker.others += 1
        self._moved(worker)
        return worker.name

    def lease(
        self,
        model: str,
        prefixes: Sequence[str] = (),
        avoid: Collection[tuple[str, int]] = frozenset(),
        fits: Callable[[Worker], bool] = lambda worker: True,
    ) -> Lease | None:
        """A place at a worker that has the model; None when there is none.

        avoid: workers as (name, epoch). fits: whether a worker speaks what the request needs.
        """
        worker = self._pick(model, prefixes, avoid, fits)
        if worker is None:
            return None
        self._remember(worker, prefixes)
        return Lease(worker, self._moved)

    def _pick(
        self,
        model: str,
        prefixes: Sequence[str],
        avoid: Collection[tuple[str, int]],
        fits: Callable[[Worker], bool],
    ) -> Worker | None:
        def able(worker: Worker) -> bool:
            return (
                worker.healthy
                and model in worker.status.models
                and fits(worker)
                and not (avoid and (worker.name, worker.epoch) in avoid)
            )

        pool = self._pools.get(model)
        return None if pool is None else self._choose(pool, prefixes, able)
