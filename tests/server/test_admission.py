"""Whose turn it is: fair between clients, bounded, nothing lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from vlmchat.errors import Overloaded, Unavailable
from vlmchat.server.admission import Admission, Ticket


def _run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def _admission(slots: int = 1, max_waiting: int = 4, max_tokens: int = 100) -> Admission:
    return Admission(slots, max_waiting, max_tokens, clock=lambda: 0.0)


async def _queue(admission: Admission, *asked: tuple[str, int]) -> list[asyncio.Task[Ticket]]:
    """Requests of (client, tokens) that ask one after the other, and their tasks."""
    tasks = []
    for client, tokens in asked:
        tasks.append(asyncio.create_task(admission.enter(client, 1, tokens)))
        await asyncio.sleep(0)
    return tasks


async def _order(admission: Admission, tasks: list[asyncio.Task[Ticket]]) -> list[int]:
    """The places in `tasks` in the order in which they run, one after the other."""
    order: list[int] = []
    while len(order) < len(tasks):
        await asyncio.sleep(0)
        for place, task in enumerate(tasks):
            if task.done() and place not in order:
                order.append(place)
                admission.leave(task.result(), 1)
    return order


def test_admission_takes_turns_between_clients_whatever_one_of_them_queues() -> None:
    async def test() -> None:
        admission = _admission(max_waiting=10)
        flood = [("flood", 1)] * 4
        tasks = await _queue(admission, *flood, ("small", 1), ("other", 1))
        assert await _order(admission, tasks) == [0, 4, 5, 1, 2, 3]
        assert (admission.running, admission.waiting) == (0, 0)

    _run(test())


def test_admission_refuses_when_as_many_wait_as_may() -> None:
    async def test() -> None:
        admission = _admission(max_waiting=2)
        await _queue(admission, ("a", 1), ("a", 1), ("a", 1))
        with pytest.raises(Overloaded, match="2 requests") as refused:
            await admission.enter("a", 1, 1)
        assert refused.value.retry_after_s >= 1

    _run(test())


def test_admission_turns_away_the_flood_when_somebody_else_comes() -> None:
    async def test() -> None:
        admission = _admission(max_waiting=2)
        tasks = await _queue(admission, ("a", 1), ("a", 1), ("a", 1), ("b", 1))
        await asyncio.sleep(0)
        assert isinstance(tasks[2].exception(), Overloaded)
        assert not tasks[3].done()

    _run(test())


def test_admission_bounds_the_tokens_that_wait() -> None:
    async def test() -> None:
        admission = _admission(max_tokens=100)
        await _queue(admission, ("a", 500), ("a", 60))
        with pytest.raises(Overloaded, match="60 prompt tokens"):
            await admission.enter("b", 1, 60)

    _run(test())


def test_admission_lets_one_wait_however_large() -> None:
    async def test() -> None:
        admission = _admission(max_tokens=100)
        first, large = await _queue(admission, ("a", 1), ("a", 500))
        admission.leave(await first, 1)
        assert (await large).tokens == 500

    _run(test())


def test_admission_gives_back_the_place_of_who_left_the_queue() -> None:
    async def test() -> None:
        admission = _admission()
        first, gone, last = await _queue(admission, ("a", 1), ("b", 1), ("c", 1))
        gone.cancel()
        await asyncio.sleep(0)
        admission.leave(await first, 1)
        await last
        assert (admission.running, admission.waiting) == (1, 0)

    _run(test())


def test_admission_passes_over_who_is_leaving_as_a_place_is_given_back() -> None:
    async def test() -> None:
        admission = _admission()
        first, gone, last = await _queue(admission, ("a", 1), ("b", 1), ("c", 1))
        gone.cancel()
        admission.leave(await first, 1)  # the task that was cancelled has not run since
        await last
        assert (admission.running, admission.waiting) == (1, 0)

    _run(test())


def test_admission_turns_away_the_rest_when_one_of_them_is_leaving() -> None:
    async def test() -> None:
        admission = _admission()
        _, gone, told = await _queue(admission, ("a", 1), ("b", 1), ("b", 1))
        gone.cancel()
        admission.abandon(Unavailable("closing"))
        with pytest.raises(Unavailable):
            await told
        with pytest.raises(asyncio.CancelledError):
            await gone

    _run(test())


def test_admission_gives_back_a_turn_that_came_as_its_client_left() -> None:
    async def test() -> None:
        admission = _admission()
        first, gone = await _queue(admission, ("a", 1), ("b", 1))
        admission.leave(await first, 1)  # grants, but the task has not run since
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert admission.running == 0

    _run(test())


def test_admission_waits_until_all_units_of_a_wide_request_are_free() -> None:
    async def test() -> None:
        admission = _admission(slots=2)
        (first,) = await _queue(admission, ("a", 1))
        wide = asyncio.create_task(admission.enter("b", 2, 1))
        (late,) = await _queue(admission, ("a", 1))
        await asyncio.sleep(0)
        assert not wide.done()
        admission.leave(await first, 1)
        ticket = await wide
        assert not late.done()
        admission.leave(ticket, 2)
        await late

    _run(test())
