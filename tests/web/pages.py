"""A page in a thread of this process, on a port of its own, as browsers meet it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes import ScriptedBackend
from vlmchat.config import ImagePolicy
from vlmchat.errors import NoWorker
from vlmchat.images import ImageLoader
from vlmchat.request import Backend
from vlmchat.server.pictures import Pictures
from vlmchat.server.serve import Server, bind, port_of
from vlmchat.web.log import ConversationLog
from vlmchat.web.models import Models
from vlmchat.web.moderation import Moderation
from vlmchat.web.page import Page, PageOptions
from vlmchat.web.person import People
from vlmchat.web.site import site


@dataclass
class Workers:
    """Models that come and go as a test says."""

    there: dict[str, Backend] = field(default_factory=dict)
    seen: tuple[str, ...] = ()
    trouble: str = ""

    def names(self) -> tuple[str, ...]:
        """See `Models`."""
        self.seen = tuple(dict.fromkeys((*self.seen, *self.there)))
        return self.seen

    def present(self) -> tuple[str, ...]:
        """See `Models`."""
        return tuple(self.there)

    def backend(self, name: str) -> Backend:
        """See `Models`."""
        if name not in self.there:
            raise NoWorker(f"the model {name} is not there at present; try again")
        return self.there[name]

    def close(self) -> None:
        """See `Models`."""


@dataclass
class Served:
    """A page that listens at `url`."""

    url: str
    people: People
    page: Page


@contextmanager
def served(
    models: Models,
    policy: ImagePolicy | None = None,
    log_dir: Path | None = None,
    moderation: Moderation | None = None,
    *,
    embed: bool = False,
) -> Iterator[Served]:
    """The page over `models`, until the `with` ends."""
    policy = policy or ImagePolicy(allow_local_files=False)
    loader = ImageLoader(policy)
    people = People(loader)
    log = ConversationLog(log_dir) if log_dir else None
    pictures, options = Pictures(policy, 16), PageOptions(embed=embed)
    made: list[tuple[asyncio.AbstractEventLoop, Server, Page]] = []
    started = threading.Event()
    sock = bind("127.0.0.1", 0)

    async def serve() -> None:
        async def drain() -> None:
            people.close()

        page = Page(models, people, loader, pictures, options, log, moderation)
        app = site(page, people, policy, answers=4, only_local=True, embed=embed)
        server = Server(app, drain)
        server.config.lifespan = "on"
        server.config.timeout_graceful_shutdown = 1
        made.append((asyncio.get_running_loop(), server, page))
        started.set()
        await server.run_on(sock)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="test-page", daemon=True)
    thread.start()
    try:
        assert started.wait(20)
        yield Served(f"http://127.0.0.1:{port_of(sock)}", people, made[0][2])
    finally:
        loop, server, _ = made[0]
        loop.call_soon_threadsafe(server.stop)
        thread.join(20)
        sock.close()
        assert not thread.is_alive()


def scripted(answers: list[str | Exception] | None = None, delay_s: float = 0.0) -> ScriptedBackend:
    """A model that says what it was told to say."""
    return ScriptedBackend(answers or [], context_length=2048, delay_s=delay_s)


def long_answer(words: int = 400) -> str:
    """One that leaves time to stop it."""
    return " ".join(f"word{number}" for number in range(words))
