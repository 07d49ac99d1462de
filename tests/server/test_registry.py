"""Who is there, how long queues are, who gets the next request. Clock and chance are the test's."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmchat.errors import InvalidRequest
from vlmchat.server.dispatch import chooser, prefix_hashes, text_hashes
from vlmchat.server.registry import Registry, WorkerStatus


class Clock:
    """Seconds, as the test says."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def status(queue: int = 0, speed: float = 1, model: str = "m", **ours: Any) -> WorkerStatus:
    return WorkerStatus((model,), speed, queue, ours)


def registry(method: Any = "shortest_queue", *, margin: int = 4) -> tuple[Registry, Clock]:
    clock = Clock()
    return Registry(chooser(method, random.Random(3), margin), clock), clock


def leased(found: Registry, *arguments: Any) -> str:
    lease = found.lease("m", *arguments)
    assert lease is not None
    return lease.worker.name


def test_registry_gives_each_request_to_the_shortest_queue_counting_what_it_gave() -> None:
    found, _ = registry()
    found.register("a", True, status(queue=2))
    found.register("b", True, status(queue=0))
    assert [leased(found) for _ in range(5)] == ["b", "b", "a", "b", "a"]


def test_registry_takes_the_first_of_equal_queues_and_weighs_them_by_speed() -> None:
    found, _ = registry()
    found.register("a", True, status(queue=4, speed=4))
    found.register("b", True, status(queue=2, speed=1))
    found.register("c", True, status(queue=1, speed=1))
    assert leased(found) == "a"


def test_registry_counts_a_lease_until_it_is_given_back_once() -> None:
    found, _ = registry()
    worker = found.register("a", True, status())
    lease = found.lease("m")
    assert lease is not None
    assert worker.queue_length == 1
    lease.give_back()
    lease.give_back()
    assert worker.queue_length == 0


@given(st.lists(st.sampled_from(["lease", "return", "beat"]), max_size=60))
def test_registry_queue_is_never_less_than_the_leases_held(steps: list[str]) -> None:
    found, _ = registry()
    worker = found.register("a", True, status())
    held: list[Any] = []
    for step in steps:
        if step == "lease":
            held.append(found.lease("m"))
        elif step == "return" and held:
            held.pop().give_back()
        elif step == "beat":
            found.beat("a", len(held) + 2)
        assert len(held) <= worker.queue_length <= len(held) + 2


def test_registry_beat_tells_of_others_requests_beyond_the_leases() -> None:
    found, _ = registry()
    worker = found.register("a", True, status())
    assert found.lease("m") is not None
    found.beat("a", 3)
    assert worker.queue_length == 3


def test_registry_counts_an_address_it_gave_away_until_the_next_beat() -> None:
    found, _ = registry()
    found.register("a", True, status())
    found.register("b", True, status())
    assert [found.address("m") for _ in range(3)] == ["a", "b", "a"]
    found.beat("a", 0)
    assert found.address("m") == "a"


def test_registry_has_no_address_for_a_model_that_nobody_serves() -> None:
    found, _ = registry()
    assert found.address("m") == ""


def test_registry_forgets_who_is_silent_for_more_than_30_s_and_says_so_at_the_next_beat() -> None:
    found, clock = registry()
    found.register("a", True, status())
    found.register("b", False, status())
    clock.now += 30
    assert found.expire() == []
    clock.now += 0.1
    assert [worker.name for worker in found.expire()] == ["a"]
    assert (found.beat("a", 0), found.beat("b", 0)) == (False, True)


def test_registry_avoids_a_worker_that_failed_until_it_recovers_or_registers_anew() -> None:
    found, _ = registry()
    worker = found.register("a", True, status())
    before = (worker.name, worker.epoch)
    worker.fail("cut off")
    assert found.lease("m") is None
    worker.recover()
    assert leased(found, (), {before}) == "a"
    worker.fail("cut off")
    found.register("a", True, status())
    assert leased(found) == "a"


def test_registry_takes_queue_and_models_of_a_new_registration() -> None:
    found, _ = registry()
    found.register("a", True, status(queue=7))
    worker = found.register("a", True, status(queue=1, model="n"))
    assert (found.models(), worker.queue_length, len(found.workers)) == (["n"], 1, 1)


def test_registry_remembers_for_a_while_which_models_were_served() -> None:
    found, clock = registry()
    found.register("a", True, status())
    found.remove("a")
    assert found.knows("m")
    clock.now += 601
    assert not found.knows("m")


def test_lottery_draws_in_proportion_to_speed() -> None:
    found, _ = registry("lottery")
    found.register("a", True, status(speed=3))
    found.register("b", True, status(speed=1))
    drawn = Counter(leased(found) for _ in range(4000))
    assert 2850 < drawn["a"] < 3150


def test_lottery_has_no_winner_when_nobody_has_speed() -> None:
    found, _ = registry("lottery")
    found.register("a", True, status(speed=0))
    assert (found.address("m"), found.lease("m")) == ("", None)


def test_cache_aware_goes_where_the_beginning_lies() -> None:
    found, _ = registry("cache_aware")
    found.register("a", True, status())
    found.register("b", True, status(queue=1, prefixes=["p1", "p2"]))
    assert leased(found, ("p1", "p2", "p3")) == "b"
    assert leased(found, ("p1", "p2", "p3", "p4")) == "b"
    assert leased(found, ("q1",)) == "a"


def test_cache_aware_leaves_a_queue_that_is_longer_than_the_margin() -> None:
    found, _ = registry("cache_aware", margin=2)
    found.register("a", True, status())
    found.register("b", True, status(prefixes=["p1"]))
    names = [leased(found, ("p1",)) for _ in range(4)]
    assert names == ["b", "b", "b", "a"]


def test_cache_aware_forgets_what_a_process_knew_that_was_replaced() -> None:
    found, _ = registry("cache_aware")
    found.register("a", True, status())
    found.register("b", True, status(instance="1", prefixes=["p1"]))
    found.register("b", True, status(instance="2"))
    assert leased(found, ("p1",)) == "a"


def by_looking_at_each(found: Registry, prefixes: list[str], method: str) -> str:
    """Whom shortest_queue or cache_aware, of margin 1, must choose."""
    workers = [w for w in found.workers if w.healthy and "m" in w.status.models]
    shortest = min(workers, key=lambda w: w.queue_length / w.speed, default=None)
    if shortest is None or method == "shortest_queue":
        return shortest.name if shortest else ""
    known = {
        w: max((n + 1 for n, p in enumerate(prefixes) if p in w.prefixes), default=0)
        for w in workers
    }
    most = [w for w in workers if known[w] == max(known.values())]
    best = min(most, key=lambda w: w.queue_length / w.speed)
    return (best if best.queue_length <= shortest.queue_length + 1 else shortest).name


steps_of_life = st.tuples(
    st.sampled_from(["lease", "return", "register", "remove", "beat", "fail", "recover"]),
    st.sampled_from("abcd"),
    st.integers(0, 4),
)


@given(st.sampled_from(["shortest_queue", "cache_aware"]), st.lists(steps_of_life, max_size=80))
def test_registry_chooses_as_if_it_looked_at_every_worker(method: str, steps: Any) -> None:
    found, _ = registry(method, margin=1)
    held: list[Any] = []
    for step, name, n in steps:
        worker = next((w for w in found.workers if w.name == name), None)
        if step == "lease":
            prefixes = ["p", *(f"p{name}{k}" for k in range(n))]
            expected = by_looking_at_each(found, prefixes, method)
            held += [lease] if (lease := found.lease("m", prefixes)) else []
            assert (lease.worker.name if lease else "") == expected
        elif step == "return" and held:
            held.pop(n % len(held)).give_back()
        elif step == "register":
            models = "m" if n else "other"
            found.register(name, True, status(n, 1 + n % 2, models, instance=n % 3))
        elif step == "remove":
            found.remove(name)
        elif step == "beat":
            found.beat(name, n, {"prefixes": [f"p{name}{k}" for k in range(n)]})
        elif worker is not None:
            worker.fail("cut off") if step == "fail" else worker.recover()


def test_registry_remembers_a_limited_number_of_prefixes_and_who_has_them() -> None:
    found, _ = registry("cache_aware")
    worker = found.register("a", True, status())
    for n in range(5000):
        found.lease("m", [f"p{n}"])
    assert len(worker.prefixes) == len(found._holders) == 4096
    found.remove("a")
    assert not found._holders


@pytest.mark.parametrize("method", ["lottery", "shortest_queue", "cache_aware"])
def test_registry_does_not_look_at_each_of_many_workers(method: str) -> None:
    found, _ = registry(method)
    for n in range(1000):
        found.register(f"w{n}", True, status(prefixes=["p"]))
    looked: list[str] = []

    def fits(worker: Any) -> bool:
        looked.append(worker.name)
        return True

    for n in range(100):
        assert found.lease("m", ("p", f"p{n}"), (), fits) is not None
    assert len(looked) < 300


def test_lottery_leaves_out_those_that_cannot_take_the_request() -> None:
    found, _ = registry("lottery")
    found.register("a", True, status(speed=1000)).fail("cut off")
    found.register("b", True, status(speed=1))
    assert {leased(found) for _ in range(20)} == {"b"}


TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "text", "text": "what is it?"},
        ],
    },
]


def test_prefix_hashes_of_a_next_turn_begin_with_those_of_the_last() -> None:
    later: list[dict[str, Any]] = [
        *TURNS,
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": "?"},
    ]
    assert prefix_hashes(later)[:2] == prefix_hashes(TURNS)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param((0, "content"), "be long", id="system"),
        pytest.param((1, "role"), "assistant", id="role"),
        pytest.param((1, "content", 0, "image_url", "url"), "data:x", id="picture"),
        pytest.param((1, "content", 1, "text"), "what?", id="text"),
    ],
)
def test_prefix_hashes_differ_where_something_else_is_said(path: Any, value: str) -> None:
    import copy

    other: Any = copy.deepcopy(TURNS)
    place = other
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert prefix_hashes(other)[-1] != prefix_hashes(TURNS)[-1]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.lists(json_values, max_size=4))
def test_prefix_hashes_take_whatever_json_holds(messages: Any) -> None:
    assert len(prefix_hashes(messages)) == len(messages)


def test_text_hashes_of_a_longer_prompt_begin_alike_but_for_the_last() -> None:
    short, long = text_hashes("x" * 1500, ["AA"]), text_hashes("x" * 2500, ["AA"])
    assert long[:2] == short[:2]
    assert text_hashes("x" * 1500, ["BB"])[0] != short[0]


@given(json_values)
def test_worker_status_is_read_or_refused(body: Any) -> None:
    try:
        WorkerStatus.parse(body)
    except InvalidRequest:
        return
    assert isinstance(body, dict)


@pytest.mark.parametrize(
    "change",
    [
        {"model_names": "m"},
        {"model_names": [1]},
        {"model_names": ["\ud800"]},
        {"speed": -1},
        {"speed": float("nan")},
        {"queue_length": None},
        {"queue_length": True},
        {"speed": 1e12},
    ],
)
def test_worker_status_refuses_what_it_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        WorkerStatus.parse({"model_names": ["m"], "speed": 1, "queue_length": 0, **change})
