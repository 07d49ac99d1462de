"""What the worker tells its controller, which may be of either kind, late, or forgetful."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vlmchat.server.heartbeat import Heartbeat, Registration
from vlmchat.server.serve import Server, bind, port_of

STATUS = {"model_names": ["m"], "speed": 1, "queue_length": 3, "vlmchat": {"version": "0"}}


class Controller:
    """Knows LLaVA's two endpoints for workers, and notes what it is told."""

    def __init__(self, exist: bool = True) -> None:
        self.told: list[tuple[str, Any]] = []
        self.exist = exist
        self.refuses = ""
        self.app = Starlette(
            routes=[
                Route("/register_worker", self._note, methods=["POST"]),
                Route("/receive_heart_beat", self._note, methods=["POST"]),
            ]
        )

    async def _note(self, request: Request) -> Response:
        self.told.append((request.url.path, json.loads(await request.body())))
        if self.refuses:
            return JSONResponse({"error": {"message": self.refuses}}, 403)
        return JSONResponse({"exist": self.exist} if "beat" in request.url.path else None)

    async def heard(self, path: str, count: int = 1) -> list[Any]:
        """The bodies sent to `path`, once they are so many."""
        while len(bodies := [body for p, body in self.told if p == path]) < count:
            await asyncio.sleep(0.01)
        return bodies


def _run(test: Callable[[Controller, Heartbeat, Server, Any], Awaitable[None]]) -> None:
    async def main() -> None:
        controller = Controller()

        async def drain() -> None:
            pass

        with bind("127.0.0.1", 0) as sock:
            url = f"http://127.0.0.1:{port_of(sock)}"
            server = Server(controller.app, drain)
            heart = Heartbeat(Registration(url, "http://w:1"), lambda: STATUS, interval_s=0.05)
            beating = asyncio.create_task(heart.run())
            await test(controller, heart, server, sock)
            beating.cancel()
            await heart.close()

    asyncio.run(main())


def test_heartbeat_registers_beats_and_registers_again_when_forgotten() -> None:
    async def test(controller: Controller, heart: Heartbeat, server: Server, sock: Any) -> None:
        serving = asyncio.create_task(server.run_on(sock))
        (body,) = await controller.heard("/register_worker")
        assert body["worker_name"] == "http://w:1"
        assert body["check_heart_beat"] is True
        assert body["worker_status"] == STATUS
        beats = await controller.heard("/receive_heart_beat")
        assert (beats[0]["worker_name"], beats[0]["queue_length"]) == ("http://w:1", 3)
        controller.exist = False
        await controller.heard("/register_worker", 2)
        await heart.goodbye()  # a path that this controller does not know
        server.stop()
        await serving

    _run(test)


def test_heartbeat_is_silent_after_its_goodbye() -> None:
    async def test(controller: Controller, heart: Heartbeat, server: Server, sock: Any) -> None:
        serving = asyncio.create_task(server.run_on(sock))
        await controller.heard("/receive_heart_beat")
        await heart.goodbye()
        told = len(controller.told)
        await asyncio.sleep(0.2)  # four beats' time; one may have been on its way
        assert len(controller.told) <= told + 1
        server.stop()
        await serving

    _run(test)


def test_heartbeat_tries_until_the_controller_is_there() -> None:
    async def test(controller: Controller, heart: Heartbeat, server: Server, sock: Any) -> None:
        sock.listen(0)
        await asyncio.sleep(0.2)  # nobody answers yet
        assert not heart.registered
        serving = asyncio.create_task(server.run_on(sock))
        await controller.heard("/register_worker")
        server.stop()
        await serving

    _run(test)


def test_heartbeat_logs_why_the_controller_refuses_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test(controller: Controller, heart: Heartbeat, server: Server, sock: Any) -> None:
        controller.refuses = "another worker answers there"
        serving = asyncio.create_task(server.run_on(sock))
        await controller.heard("/register_worker", 2)
        server.stop()
        await serving

    with caplog.at_level("WARNING"):
        _run(test)
    assert caplog.text.count("another worker answers there; trying on") == 1
