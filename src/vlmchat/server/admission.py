"""Who may run now, who waits, and who must come back later: fair between clients.

Called by the worker, on its event loop. Counts requests and prompt tokens; knows nothing of what
they ask. A client is a name. The next to run is the longest waiting request of the client with the
fewest running; when no more may wait, the newest request of the client with the most waiting goes,
so that a flood turns away its own.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vlmchat.errors import Overloaded

MAX_RETRY_AFTER_S = 60
_MEMORY = 0.9  # of the moving average of how long a unit is held


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place: `units` of the slots, once granted."""

    client: str
    units: int
    tokens: int
    granted: asyncio.Future[None]
    since: float = 0.0


@dataclass(slots=True)
class _Client:
    waiting: deque[Ticket] = field(default_factory=deque)
    running: int = 0  # units
    last_turn: int = 0

    @property
    def waiting_tokens(self) -> int:
        return sum(ticket.tokens for ticket in self.waiting)


class Admission:
    """`slots` units at a time; at most `max_waiting` requests, of `max_tokens` in all, wait.

    clock() gives seconds.
    """

    def __init__(
        self, slots: int, max_waiting: int, max_tokens: int, clock: Callable[[], float]
    ) -> None:
        self.slots, self.free = slots, slots
        self._max_waiting, self._max_tokens, self._clock = max_waiting, max_tokens, clock
        self._clients: dict[str, _Client] = {}
        self._turn = 0
        self._mean_s = 1.0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(client.waiting) for client in self._clients.values())

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of those."""
        return sum(client.waiting_tokens for client in self._clients.values())

    @property
    def running(self) -> int:
        """Units in use."""
        return self.slots - self.free

    async def enter(self, client: str, units: int, tokens: int) -> Ticket:
        """Wait for one's turn. Raises Overloaded, also while waiting; cancelling leaves the queue.

        units: at most `slots`.
        """
        ticket = Ticket(client, units, tokens, asyncio.get_running_loop().create_future())
        if self.waiting or self.free < units:
            self._make_room(client, tokens)
        self._client(client).waiting.append(ticket)
        self._grant()
        try:
            await ticket.granted
        except BaseException:
            if ticket.granted.cancelled():
                self._remove(ticket)
            elif ticket.granted.exception() is None:
                self.leave(ticket, ticket.units)
            raise
        return ticket

    def leave(self, ticket: Ticket, units: int) -> None:
        """Give `units` of a granted ticket back."""
        held_s = self._clock() - ticket.since
        self._mean_s = _MEMORY * self._mean_s + (1 - _MEMORY) * held_s
        self.free += units
        self._client(ticket.client).running -= units
        self._forget(ticket.client)
        self._grant()

    def abandon(self, error: Exception) -> None:
        """Nobody who waits will have a turn: they all hear of `error`."""
        for name, client in list(self._clients.items()):
            while client.waiting:
                _refuse(client.waiting.pop(), error)
            self._forget(name)

    def retry_after_s(self) -> int:
        """When it is worth asking again, from how long answers took lately."""
        wait_s = (self.waiting + 1) * self._mean_s / self.slots
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s)))

    def _client(self, name: str) -> _Client:
        return self._clients.setdefault(name, _Client())

    def _forget(self, name: str) -> None:
        client = self._clients.get(name)
        if client is not None and not client.waiting and not client.running:
            del self._clients[name]

    def _grant(self) -> None:
        while waiting := [client for client in self._clients.values() if client.waiting]:
            client = min(waiting, key=lambda one: (one.running, one.last_turn))
            ticket = client.waiting[0]
            if ticket.granted.cancelled():  # whoever waited has left, and is about to say so
                client.waiting.popleft()
                continue
            if ticket.units > self.free:
                return
            client.waiting.popleft()
            client.running += ticket.units
            self._turn += 1
            client.last_turn = self._turn
            self.free -= ticket.units
            ticket.since = self._clock()
            ticket.granted.set_result(None)

    def _make_room(self, name: str, tokens: int) -> None:
        """Turn away whoever makes the queue too long: perhaps the newcomer. Raises Overloaded."""
        while self.waiting >= self._max_waiting:
            largest = max(self._clients, key=lambda one: len(self._clients[one].waiting))
            own = len(self._clients[name].waiting) if name in self._clients else 0
            if len(self._clients[largest].waiting) <= own + 1:
                raise self._overloaded()
            self._turn_away(largest)
        while self.waiting and self.waiting_tokens + tokens > self._max_tokens:
            largest = max(self._clients, key=lambda one: self._clients[one].waiting_tokens)
            own = self._clients[name].waiting_tokens if name in self._clients else 0
            if self._clients[largest].waiting_tokens <= own + tokens:
                raise self._overloaded()
            self._turn_away(largest)

    def _turn_away(self, name: str) -> None:
        overloaded = self._overloaded()
        _refuse(self._clients[name].waiting.pop(), overloaded)
        self._forget(name)

    def _overloaded(self) -> Overloaded:
        return Overloaded(
            f"{self.waiting} requests with about {self.waiting_tokens} prompt tokens wait already "
            f"(limits: {self._max_waiting} and {self._max_tokens}); try again later",
            self.retry_after_s(),
        )

    def _remove(self, ticket: Ticket) -> None:
        client = self._clients.get(ticket.client)
        if client is not None and ticket in client.waiting:
            client.waiting.remove(ticket)
        self._forget(ticket.client)
        self._grant()


def _refuse(ticket: Ticket, error: Exception) -> None:
    if not ticket.granted.cancelled():
        ticket.granted.set_exception(error)
