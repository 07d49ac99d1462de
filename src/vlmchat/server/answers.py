"""A backend's streams, which block, as something that an event loop can wait for.

Called by the worker. What is not pushed to us is read by a thread of its own; several answers to
one request run side by side, as far as its ticket goes. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from vlmchat.conversation import Conversation
from vlmchat.errors import Unavailable
from vlmchat.request import Backend, Delta, PushedStream, SamplingParams, Stream


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of answer number `choice`."""

    choice: int
    delta: Delta


class Answers:
    """The answers to one request, one for each of `choices`, `width` at a time.

    freed() is called for each unit of the width once its stream has really ended, also when the
    client has long left; seen(piece) when a piece is handed out. `begin`, iterate it once, then
    `close` it, whatever happened.
    """

    def __init__(
        self,
        backend: Backend,
        conversation: Conversation,
        choices: tuple[SamplingParams, ...],
        width: int,
        pool: Executor,
        freed: Callable[[], None],
        seen: Callable[[Piece], None],
    ) -> None:
        self._seen = seen
        self._backend = backend
        self._conversation: Conversation | None = conversation  # until all have begun
        self._to_encode = len(choices)
        self._choices, self._pool, self._freed = choices, pool, freed
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._next = width  # the choice to begin when a stream ends
        self._first = range(width)
        self._streams: dict[int, Stream] = {}  # by choice
        self._begun: set[asyncio.Task[None]] = set()
        self._closed = False

    async def begin(self) -> None:
        """Begin as many as go side by side; returns once the backend has their prompts."""
        first, self._first = self._first, range(0)
        for choice in first:
            self._begin(choice)
        await asyncio.wait(list(self._begun))

    async def __aiter__(self) -> AsyncIterator[Piece]:
        left = len(self._choices)
        while left:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                self._seen(item)
                yield item

    def close(self) -> None:
        """Stop what still runs."""
        self._closed = True
        for _ in self._first:
            self._freed()
        self._first = range(0)
        for stream in self._streams.values():
            stream.cancel()

    def fail(self, error: Exception) -> None:
        """Let whoever iterates hear of `error`."""
        self._items.put_nowait(error)

    def _begin(self, choice: int) -> None:
        task = self._loop.create_task(self._start(choice))
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)

    async def _start(self, choice: int) -> None:
        """Encoding takes time and memory: it has its turn in the pool."""
        params = self._choices[choice]
        try:
            stream = await self._loop.run_in_executor(self._pool, self._stream, params)
        except Exception as error:  # of any kind: it is the client's to hear
            self._ended(error)
            return
        self._to_encode -= 1
        if not self._to_encode:
            self._conversation = None  # its pictures are large, and nobody needs them any more
        self._streams[choice] = stream
        if self._closed:
            stream.cancel()
        if isinstance(stream, PushedStream):
            stream.deliver(partial(self._arrived, choice))
            return
        threading.Thread(
            target=self._read, args=(choice, stream), name="vlmchat-answer", daemon=True
        ).start()

    def _stream(self, params: SamplingParams) -> Stream:
        if self._closed or self._conversation is None:
            raise Unavailable("the client has left")
        return self._backend.stream(self._conversation, params)

    def _read(self, choice: int, stream: Stream) -> None:
        """In a thread: everything that comes, to the loop."""
        error: Exception | None = None
        try:
            for delta in stream:
                self._tell(self._items.put_nowait, Piece(choice, delta))
        except Exception as raised:  # see _start
            error = raised
        self._tell(self._read_all, choice, error)

    def _arrived(self, choice: int, item: Delta | BaseException) -> None:
        """In the backend's thread."""
        if isinstance(item, Delta):
            self._tell(self._items.put_nowait, Piece(choice, item))
            if item.finish_reason is None:
                return
        error = item if isinstance(item, Exception) else None
        self._tell(self._read_all, choice, error)

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(call, *arguments)

    def _read_all(self, choice: int, error: Exception | None) -> None:
        self._streams.pop(choice, None)
        self._ended(error)

    def _ended(self, error: Exception | None) -> None:
        self._items.put_nowait(error)
        if error is None and not self._closed and self._next < len(self._choices):
            self._begin(self._next)
            self._next += 1
        else:
            self._freed()
