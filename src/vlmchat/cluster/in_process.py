"""A request to an ASGI application in the same process: its answer, part by part.

Called by the replica, whose application is the worker's. Knows no ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Scope


class Head(NamedTuple):
    """How an answer begins. headers: in lower case."""

    status: int
    headers: list[tuple[bytes, bytes]]


async def asked(
    app: ASGIApp,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> AsyncGenerator[Head | bytes]:
    """The answer's head, then its body as it comes. Closing it is the client's leaving."""
    parts: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            parts.put_nowait(Head(message["status"], list(message.get("headers", ()))))
        elif message.get("body"):
            parts.put_nowait(message["body"])

    async def run() -> None:
        try:
            await app(_scope(method, path, headers or {}), inbox.get, send)
        finally:
            parts.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (part := await parts.get()) is not None:
            yield part
        await task  # what it raised, if it did
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _scope(method: str, path: str, headers: Mapping[str, str]) -> Scope:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), *raw],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
