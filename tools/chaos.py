"""Break workers while clients ask, and see that every answer comes through whole: `make chaos`.

Starts a controller and workers on the demo model. Clients ask conversations of three turns with
pictures, greedily and streamed; meanwhile workers are killed and restarted, one is stopped
(SIGSTOP) and goes on later, and the controller is restarted. Each answer is held against what an
undisturbed worker says. docs/reliability.md has the table of a whole run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx2
import psutil

from tools.demo.scenes import draw, random_scene

MODEL = "demo"
PICTURE = (200, 150)
MAX_TOKENS = 48
DISTINCT = 12  # conversations, asked again and again
STOPPED_S = 20.0
DRAIN_S = 2.0
CLIENT_TIMEOUT_S = 300.0
SETTLE_S = 60.0
QUESTIONS = ("Describe the image.", "How many shapes are there?", "Describe the second image.")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much, and how bad. kill_every_s: 0 kills nobody.

    seconds: clients go on asking for so long at least.
    """

    workers: int = 3
    requests: int = 300
    clients: int = 16
    kill_every_s: float = 8.0
    stop: bool = True
    restart: bool = True
    seed: int = 0
    seconds: float = 150.0


@dataclass(slots=True)
class Tally:
    """What came of it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    stops: int = 0
    restarts: int = 0
    failovers: int = 0
    asked_again: int = 0
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Every request ended in its whole answer, or was told of the restart; nothing is left.

        But for the connections by which each worker beats, and the one that asked how it stands.
        """
        fine = {"whole", "told of the restart"}
        fds, connected = self.left["more_file_descriptors"], self.left["workers_up"] + 1
        return set(self.outcomes) <= fine and not self.left["leases"] and fds <= connected


@dataclass(slots=True)
class Process:
    """A server in a process of its own."""

    role: str
    arguments: tuple[str, ...]
    log: TextIO
    process: asyncio.subprocess.Process | None = None
    url: str = ""
    ready: bool = False

    async def start(self) -> None:
        """Returns once it says that it is ready."""
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vlmchat", self.role, "--json", *self.arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=self.log,
        )
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        self.url = json.loads(line)["url"]
        self.ready = True

    def send(self, number: signal.Signals) -> None:
        """A signal, if it still runs."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    async def end(self, number: signal.Signals) -> None:
        """A signal, and wait."""
        self.ready = False
        self.send(number)
        if self.process is not None:
            await self.process.wait()

    async def kill(self) -> None:
        """At once, also when it is stopped."""
        self.send(signal.SIGCONT)
        await self.end(signal.SIGKILL)


class Fleet:
    """The servers, and what befalls them."""

    def __init__(self, plan: Plan, log: TextIO, tally: Tally) -> None:
        self._plan, self._log, self.tally = plan, log, tally
        self._random = random.Random(plan.seed)
        self.controller = Process("controller", ("--port", "0"), log)
        self.workers: list[Process] = []
        self.restarted_at = 0.0  # when it answered again
        self._restarting: set[asyncio.Task[None]] = set()
        self.idle = (0, 0)

    async def start(self) -> None:
        """All of them."""
        await self.controller.start()
        port = self.controller.url.rsplit(":", 1)[1]
        self.controller.arguments = ("--port", port, "--drain-timeout", f"{DRAIN_S:g}")
        await self.restart_controller()
        self.tally.restarts, self.restarted_at = 0, 0.0
        arguments: tuple[str, ...] = ("--model-path", MODEL, "--port", "0", "--device", "cpu")
        arguments = (*arguments, "--controller-address", self.controller.url)
        self.workers = [Process("worker", arguments, self._log) for _ in range(self._plan.workers)]
        await asyncio.gather(*(worker.start() for worker in self.workers))

    async def close(self) -> None:
        """All of them, at once."""
        for task in self._restarting:
            task.cancel()
        for process in (*self.workers, self.controller):
            await process.kill()

    async def torment(self) -> None:
        """Until cancelled."""
        plan = self._plan
        events = []
        if plan.stop:
            events.append((1.5, self.stop_one))
        if plan.restart:
            events.append((3.5, self.restart_controller))
        period, tick = plan.kill_every_s or 8.0, 0.0
        while True:
            await asyncio.sleep(period / 2)
            tick += 0.5
            if plan.kill_every_s and tick == int(tick):
                self._background(self.kill_one())
            for at, event in list(events):
                if tick >= at:
                    events.remove((at, event))
                    self._background(event())

    async def calm(self) -> None:
        """Whatever has befallen somebody is over."""
        await asyncio.gather(*self._restarting)

    def _background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._restarting.add(task)
        task.add_done_callback(self._restarting.discard)

    async def kill_one(self) -> None:
        """And start it again; never the last one that is up."""
        up = [worker for worker in self.workers if worker.ready]
        if len(up) > 1:
            victim = self._random.choice(up)
            self.tally.kills += 1
            await victim.end(signal.SIGKILL)
            await victim.start()

    async def stop_one(self) -> None:
        """For a while it neither answers nor goes away."""
        up = [worker for worker in self.workers if worker.ready]
        if len(up) > 1:
            victim = self._random.choice(up)
            victim.ready = False
            self.tally.stops += 1
            victim.send(signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)
            victim.send(signal.SIGCONT)
            victim.ready = True

    async def restart_controller(self) -> None:
        """In good order: streams that outlast its drain are told so."""
        self.tally.restarts += 1
        await self.controller.end(signal.SIGTERM)
        await self.controller.start()
        self.restarted_at = time.monotonic()
        self.idle = self.measure()

    def measure(self) -> tuple[int, int]:
        """The controller's open files, and its memory in bytes."""
        assert self.controller.process is not None
        process = psutil.Process(self.controller.process.pid)
        return process.num_fds(), process.memory_info().rss


def conversations(count: int, seed: int) -> list[list[Message]]:
    """Each as the user messages of its turns."""
    chance = random.Random(seed)
    return [
        [
            message(QUESTIONS[0], picture(chance)),
            message(QUESTIONS[1]),
            message(QUESTIONS[2], picture(chance)),
        ]
        for _ in range(count)
    ]


def picture(chance: random.Random) -> str:
    """A data URL of a random scene."""
    file = io.BytesIO()
    draw(random_scene(chance), PICTURE).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def message(text: str, url: str | None = None) -> Message:
    """A user's, with a picture perhaps."""
    parts: list[Message] = [{"type": "text", "text": text}]
    if url is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": parts}


def _request(asked: Sequence[Message], answers: Sequence[str]) -> Message:
    """The turn after `answers`."""
    messages: list[Message] = []
    for user, answer in zip(asked, answers, strict=False):
        messages += [user, {"role": "assistant", "content": answer}]
    messages.append(asked[len(answers)])
    return {
        "model": MODEL,
        "messages": messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
    }


@dataclass(slots=True)
class Heard:
    """One stream as its client got it.

    begun: it was not refused at the door. error: its code. ended: by [DONE].
    """

    text: str = ""
    begun: bool = True
    error: str | None = None
    ended: bool = False


async def hear(http: httpx2.AsyncClient, url: str, body: Message) -> Heard:
    """Raises httpx2.ConnectError when nobody listens."""
    heard = Heard()
    try:
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                said = json.loads(await answer.aread())
                heard.error, heard.begun = said["error"]["code"], False
            async for event in _events(answer):
                if "error" in event:
                    heard.error = event["error"]["code"]
                for choice in event.get("choices", ()):
                    heard.text += choice["delta"].get("content") or ""
                heard.ended = heard.ended or bool(event.get("done"))
    except httpx2.ConnectError:
        raise
    except httpx2.HTTPError as error:
        heard.error = heard.error or f"broken: {type(error).__name__}"
    return heard


async def _events(answer: httpx2.Response) -> AsyncIterator[Message]:
    async for line in answer.aiter_lines():
        if line.startswith("data: [DONE]"):
            yield {"done": True}
        elif line.startswith("data: "):
            yield json.loads(line[6:])


async def references(
    http: httpx2.AsyncClient, url: str, asked: Sequence[Sequence[Message]]
) -> list[list[str]]:
    """What an undisturbed worker answers."""
    found = []
    for turns in asked:
        answers: list[str] = []
        for _ in turns:
            heard = await hear(http, url, _request(turns, answers))
            if not heard.ended:
                raise RuntimeError(f"no reference: {heard}")
            answers.append(heard.text)
        found.append(answers)
    return found


class Clients:
    """Ask until all requests are done and the time is over."""

    def __init__(self, fleet: Fleet, asked: list[list[Message]], known: list[list[str]]) -> None:
        self._fleet, self._asked, self._known = fleet, asked, known
        self._next, self._until = 0, 0.0

    async def run(self, requests: int, clients: int, seconds: float) -> None:
        """All of them side by side."""
        self._until = time.monotonic() + seconds
        limits = httpx2.Limits(max_keepalive_connections=0)
        async with httpx2.AsyncClient(
            timeout=CLIENT_TIMEOUT_S, trust_env=False, limits=limits
        ) as http:
            await asyncio.gather(*(self._client(http, requests) for _ in range(clients)))

    async def _client(self, http: httpx2.AsyncClient, requests: int) -> None:
        while self._next < requests or time.monotonic() < self._until:
            number = self._next
            self._next += len(QUESTIONS)
            which = (number // len(QUESTIONS)) % len(self._asked)
            for turn in range(len(QUESTIONS)):
                await self._ask(http, self._asked[which], self._known[which], turn)

    async def _ask(
        self, http: httpx2.AsyncClient, asked: list[Message], known: list[str], turn: int
    ) -> None:
        body, tally, begin = _request(asked, known[:turn]), self._fleet.tally, time.monotonic()
        while True:
            restarting = not self._fleet.controller.ready
            try:
                heard = await hear(http, self._fleet.controller.url, body)
            except httpx2.ConnectError:  # between two controllers: nothing was asked yet
                heard = Heard(error="unavailable", begun=False)
            if heard.begun or not restarting:
                break
            tally.asked_again += 1
            await asyncio.sleep(0.5)
        outcome = self._outcome(heard, known[turn], begin)
        tally.outcomes[outcome] += 1
        tally.seconds.append(time.monotonic() - begin)
        if outcome != "whole":
            tally.wrong.append(f"{outcome}: {heard.error} {heard.text!r} not {known[turn]!r}")

    def _outcome(self, heard: Heard, known: str, begin: float) -> str:
        if heard.ended and heard.error is None:
            return "whole" if heard.text == known else "another text"
        restarting = not self._fleet.controller.ready or begin < self._fleet.restarted_at
        if heard.error == "unavailable" and restarting and known.startswith(heard.text):
            return "told of the restart"
        return f"error {heard.error}" if heard.error else "cut off"


@asynccontextmanager
async def _fleet(plan: Plan, tally: Tally, folder: Path) -> AsyncIterator[Fleet]:
    with (folder / "servers.log").open("w") as log:
        fleet = Fleet(plan, log, tally)
        try:
            await fleet.start()
            yield fleet
        finally:
            await fleet.close()


async def run(plan: Plan, folder: Path) -> Tally:
    """The whole of it; the servers' log lies in `folder`."""
    tally = Tally()
    asked = conversations(min(DISTINCT, -(-plan.requests // len(QUESTIONS))), plan.seed)
    async with (
        _fleet(plan, tally, folder) as fleet,
        httpx2.AsyncClient(timeout=CLIENT_TIMEOUT_S, trust_env=False) as http,
    ):
        known = await references(http, fleet.workers[0].url, asked)
        torment = asyncio.create_task(fleet.torment())
        await Clients(fleet, asked, known).run(plan.requests, plan.clients, plan.seconds)
        torment.cancel()
        await fleet.calm()
        tally.left = await _settled(http, fleet)
    tally.failovers = (folder / "servers.log").read_text("utf-8").count(" lost: ")
    return tally


async def _settled(http: httpx2.AsyncClient, fleet: Fleet) -> dict[str, Any]:
    """What is still held once everybody is back, against the idle controller."""
    end = time.monotonic() + SETTLE_S
    while True:
        workers = (await http.get(f"{fleet.controller.url}/status")).json()["workers"]
        leases = sum(worker["leases"] for worker in workers)
        queued = sum(worker["queue_length"] for worker in workers if worker["healthy"])
        up = sum(worker["healthy"] for worker in workers)
        if (not queued and up >= len(fleet.workers)) or time.monotonic() > end:
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(1.0)
    fds, rss = fleet.measure()
    return {
        "leases": leases,
        "queued": queued,
        "workers_up": up,
        "more_file_descriptors": fds - fleet.idle[0],
        "more_memory_mib": round((rss - fleet.idle[1]) / 2**20, 1),
    }


def table(plan: Plan, tally: Tally) -> str:
    """For docs/reliability.md."""
    seconds = sorted(tally.seconds)

    def at(share: float) -> str:
        return f"{seconds[min(len(seconds) - 1, int(share * len(seconds)))]:.1f} s"

    rows = [
        ("requests, clients, workers", f"{len(seconds)}, {plan.clients}, {plan.workers}"),
        (
            "kill -9, SIGSTOP, controller restarts",
            f"{tally.kills}, {tally.stops}, {tally.restarts}",
        ),
        *((f"answers: {name}", str(count)) for name, count in sorted(tally.outcomes.items())),
        ("times a request went to another worker", str(tally.failovers)),
        ("refused while the controller restarted, asked again", str(tally.asked_again)),
        ("time of a request: median, 95 %, longest", f"{at(0.5)}, {at(0.95)}, {at(1.0)}"),
        *((f"left over: {name.replace('_', ' ')}", str(n)) for name, n in tally.left.items()),
    ]
    return "\n".join(["| what | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def main() -> None:
    """See the module's docstring."""
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=plan.workers)
    parser.add_argument("--requests", type=int, default=plan.requests)
    parser.add_argument("--clients", type=int, default=plan.clients)
    parser.add_argument("--kill-every", type=float, default=plan.kill_every_s, metavar="SECONDS")
    parser.add_argument("--stop", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--restart", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=plan.seconds, help="at least")
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument("--json", action="store_true", help="the figures, as one JSON object")
    parser.add_argument("--log", type=Path, help="folder for the servers' log")
    given = parser.parse_args()
    plan = Plan(
        *(given.workers, given.requests, given.clients),
        *(given.kill_every, given.stop, given.restart, given.seed, given.seconds),
    )
    with tempfile.TemporaryDirectory() as folder:
        tally = asyncio.run(run(plan, given.log or Path(folder)))
    if given.json:
        print(json.dumps({**asdict(plan), **asdict(tally), "good": tally.good}))
    else:
        print(table(plan, tally))
    for line in tally.wrong:
        print(line, file=sys.stderr)
    sys.exit(0 if tally.good else 1)


if __name__ == "__main__":
    main()
