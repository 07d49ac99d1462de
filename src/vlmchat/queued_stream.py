"""One answer between the thread that makes it and whoever wants it.

Used by the backends, engine and client. Knows nothing of how an answer is made.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from threading import Lock

from vlmchat.request import Delta

Item = Delta | BaseException


class Outlet:
    """Takes an answer's items, of which the last is an error or has a finish reason."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._to: Callable[[Item], object] = self._items.put
        self._lock = Lock()

    def put(self, item: Item) -> None:
        """Hand it out, or keep it until somebody takes it."""
        with self._lock:
            self._to(item)

    def get(self) -> Item:
        """The next one; waits for it."""
        return self._items.get()

    def deliver(self, to: Callable[[Item], object]) -> None:
        """Call `to` with each item from now on, first with those kept, in the giver's thread."""
        with self._lock:
            while not self._items.empty():
                to(self._items.get())
            self._to = to


class QueuedStream:
    """See `Stream`. Once nobody holds it any more, it is cancelled."""

    def __init__(self, outlet: Outlet, stop: Callable[[], object]) -> None:
        self._outlet, self._stop = outlet, stop
        self._over = False

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        if self._over:
            raise StopIteration
        item = self._outlet.get()
        if isinstance(item, BaseException):
            self._over = True
            raise item
        self._over = item.finish_reason is not None
        return item

    def __del__(self) -> None:
        # Ctrl-C can land between any two lines of whoever asked, also before their `with`.
        self.cancel()

    def cancel(self) -> None:
        """See `Stream.cancel`."""
        self._stop()

    def deliver(self, to: Callable[[Item], object]) -> None:
        """See `PushedStream.deliver`."""
        self._outlet.deliver(to)
