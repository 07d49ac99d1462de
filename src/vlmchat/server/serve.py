"""Run an application on a socket until a signal, and end it in good order.

Called by the commands `worker` and `controller`. The first SIGTERM or Ctrl-C drains, the second
ends the process at once. Knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from vlmchat.errors import ConfigError

BACKLOG = 2048
CLOSING_S = 5.0  # for connections to close once all is answered


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason.lower()}") from None
    return sock


def port_of(sock: socket.socket) -> int:
    """The port that it listens on."""
    return int(sock.getsockname()[1])


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ip_address(sock.getsockname()[0]).is_loopback


def url_of(host: str, port: int) -> str:
    """The address by which others reach a server on `host`."""
    name = {"0.0.0.0": "localhost", "::": "localhost", "": "localhost"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


class Server(uvicorn.Server):
    """uvicorn, with a drain before its shutdown.

    drain() returns once nothing is under way that is to be waited for.
    """

    def __init__(self, app: ASGIApp, drain: Callable[[], Awaitable[None]]) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=int(CLOSING_S),
        )
        super().__init__(config)
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run_on(self, sock: socket.socket) -> None:
        """Serve until a signal, or `stop`, and the drain that follows it."""
        self._loop = asyncio.get_running_loop()
        await self.serve([sock])

    def stop(self) -> None:
        """Begin to drain, from the loop's thread."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the second is not survived."""
        if self._draining is not None or self._loop is None:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
        else:
            self._loop.call_soon_threadsafe(self.stop)
