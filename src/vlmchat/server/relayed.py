"""An answer on its way to the client: its form on each wire, pings in silences, clients that leave.

Called by the controller and by LLaVA's half of the worker. Knows nothing of workers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vlmchat.errors import VlmchatError
from vlmchat.server.app import error_object
from vlmchat.server.failover import Item, Refusal
from vlmchat.server.openai_relay import assemble

T = TypeVar("T")

SSE_PING_S = 10.0


class Form(Protocol):
    """How items become bytes. ping: what is sent every `ping_s` seconds of silence, if anything.

    begins: whether errors that come first are told in the body too, under status 200.
    """

    headers: dict[str, str]
    ping: bytes
    ping_s: float
    begins: bool

    def item(self, item: Item) -> bytes:
        """Sent at once, unless empty."""

    def error(self, error: VlmchatError | Refusal) -> bytes:
        """In place of what is missing."""

    def end(self) -> bytes:
        """After the last item."""


class StreamForm:
    """Server-sent events, as OpenAI's."""

    def __init__(self) -> None:
        self.headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
        self.ping, self.ping_s, self.begins = b": ping\n\n", SSE_PING_S, False

    def item(self, item: Item) -> bytes:
        """One chunk."""
        return b"data: " + json.dumps(item, separators=(",", ":")).encode() + b"\n\n"

    def error(self, error: VlmchatError | Refusal) -> bytes:
        """The error object; no [DONE] follows it."""
        return self.item(described(error))

    def end(self) -> bytes:
        """OpenAI's mark."""
        return b"data: [DONE]\n\n"


class WholeForm:
    """One JSON object at the end."""

    def __init__(self) -> None:
        self.headers = {"content-type": "application/json"}
        self.ping, self.ping_s, self.begins = b"", SSE_PING_S, False
        self._chunks: list[Item] = []

    def item(self, item: Item) -> bytes:
        """Kept."""
        self._chunks.append(item)
        return b""

    def error(self, error: VlmchatError | Refusal) -> bytes:
        """Never asked for: nothing is sent before the end."""
        return b""

    def end(self) -> bytes:
        """Everything."""
        return json.dumps(assemble(self._chunks)).encode()


def described(error: VlmchatError | Refusal) -> Item:
    """As OpenAI's error object."""
    return {"error": error.error} if isinstance(error, Refusal) else error_object(error)


class Relayed(Response):
    """The response: `items` in their form, until they end or the client leaves.

    around(record) is entered for as long as the answer is under way.
    """

    def __init__(
        self,
        items: AsyncGenerator[Item, None],
        form: Form,
        around: Callable[[dict[str, Any]], AbstractAsyncContextManager[None]],
    ) -> None:
        self._items, self._form, self._around = items, form, around

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientDisconnect when the client leaves, and errors that come first."""
        work = asyncio.create_task(self._answer(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            left = not work.done()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})
        if left:
            raise ClientDisconnect
        work.result()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, form, started = scope["state"]["record"], self._form, False

        async def say(data: bytes) -> None:
            nonlocal started
            if data and not started:
                started = True
                headers = [(k.encode(), v.encode()) for k, v in form.headers.items()]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            async with (
                self._around(record),
                aclosing(with_pings(self._items, form.ping_s)) as parts,
            ):
                async for item in parts:
                    await say(form.ping if item is None else form.item(item))
            await say(form.end())
        except (VlmchatError, Refusal) as error:
            record["error"] = described(error)["error"]
            if not started and not form.begins:
                await _refused(error, scope, receive, send)
                return
            await say(form.error(error))
        await say(b"")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _refused(
    error: VlmchatError | Refusal, scope: Scope, receive: Receive, send: Send
) -> None:
    """An error in place of an answer, with its own status."""
    if isinstance(error, VlmchatError):
        raise error
    headers = {"retry-after": error.retry_after} if error.retry_after else {}
    status = error.status if error.status >= 400 else 502
    await JSONResponse(described(error), status, headers)(scope, receive, send)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def with_pings(
    items: AsyncGenerator[T, None], every_s: float
) -> AsyncGenerator[T | None, None]:
    """The items, and None after each `every_s` seconds without one.

    They are made in one task, which is cancelled when this is closed.
    """
    queue: asyncio.Queue[tuple[T | None, Exception | None, bool]] = asyncio.Queue(1)

    async def pump() -> None:
        end: Exception | None = None
        try:
            async with aclosing(items):
                async for item in items:
                    await queue.put((item, None, False))
        except Exception as error:  # handed to whoever reads
            end = error
        await queue.put((None, end, True))

    task = asyncio.create_task(pump())
    try:
        while True:
            try:
                async with asyncio.timeout(every_s):
                    item, error, over = await queue.get()
            except TimeoutError:
                yield None
                continue
            if error is not None:
                raise error
            if over:
                return
            yield item
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
