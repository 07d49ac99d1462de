"""The simulation of many workers: nothing is lost, chance comes from the seed, figures by hand."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.scale.command import main, parser, plans
from benchmarks.scale.costs import (
    BEAT_S,
    CONVERSATIONS,
    REQUEST_S,
    TOKEN_S,
    controller_cores,
    full_registry,
)
from benchmarks.scale.profiles import CPU, People, Profile
from benchmarks.scale.simulation import Plan, Simulation
from benchmarks.scale.worker import Engine, Session, Slots, Turn
from vlmchat.engine.prefix_cache import PrefixCache

SMALL = Plan(workers=4, sessions=600, profile=CPU)
# One request at a time, one second each, whatever it is.
ONE_SECOND = Profile("second", 1.0, 0.0, 1.0, 0.0, running=1, slots=1, waiting=10**9)
ONE_TURN = People(turns=1.0, answer=(1.0, 0.0))


@pytest.mark.parametrize("policy", ["lottery", "shortest_queue", "cache_aware"])
def test_simulation_answers_every_turn_and_leaves_nothing_under_way(policy: Any) -> None:
    counted = Simulation(replace(SMALL, policy=policy)).run()
    assert counted.answered == counted.asked >= SMALL.sessions
    assert counted.left == 0


def test_simulation_answers_every_turn_where_workers_refuse() -> None:
    narrow = replace(CPU, waiting=1)
    counted = Simulation(replace(SMALL, profile=narrow, load=1.6)).run()
    assert counted.refused > 0
    assert (counted.answered, counted.left) == (counted.asked, 0)


def test_simulation_answers_every_turn_behind_several_controllers() -> None:
    counted = Simulation(replace(SMALL, controllers=3, sticky=False)).run()
    assert (counted.answered, counted.left) == (counted.asked, 0)


def test_simulation_repeats_itself_by_its_seed_alone() -> None:
    first, again, other = (Simulation(replace(SMALL, seed=seed)).run() for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_simulation_waits_as_long_as_the_formula_for_one_server_says() -> None:
    load = 0.7
    plan = Plan(1, 20_000, ONE_SECOND, "shortest_queue", load, people=ONE_TURN)
    counted = Simulation(plan).run()
    mean_s = sum(counted.first_s) / len(counted.first_s)
    # M/D/1, Pollaczek and Khinchine: the mean wait is load / (2 (1 - load)) services.
    assert mean_s == pytest.approx(1.0 + load / (2 * (1 - load)), rel=0.05)


@pytest.mark.parametrize("seed", [1, 2])
def test_cache_aware_finds_more_in_caches_than_lottery_and_answers_sooner(seed: int) -> None:
    aware, drawn = (
        Simulation(replace(SMALL, policy=policy, sessions=1200, seed=seed)).run()
        for policy in ("cache_aware", "lottery")
    )
    assert aware.hit_rate > 2 * drawn.hit_rate
    assert aware.first_token_s(0.5) < drawn.first_token_s(0.5)


def _session(number: int, picture: int | None = None, tokens: int = 100) -> Session:
    return Session(number, picture, 1, tokens, system_tokens=10, picture_tokens=50)


def test_worker_caches_by_hand_what_it_has_seen() -> None:
    engine = Engine("w", ONE_SECOND)
    turns = [Turn(_session(1), 100, 2, 0.0), Turn(_session(1), 130, 2, 0.0)]
    turns += [Turn(_session(2), 100, 2, 0.0), Turn(_session(1), 150, 2, 0.0)]
    ends = []
    for turn in turns:
        engine.ask(turn)
    while engine.queue_length:
        engine.advance(engine.due())
        turn, ended = engine.happen()
        ends += [turn] if ended else []
    assert ends == turns
    # 100 + 2 tokens but the last; then the system prompt only, in the one slot there is.
    assert [turn.cached for turn in turns] == [0, 101, 10, 10]


def test_worker_decodes_together_and_computes_prompts_one_after_the_other() -> None:
    engine = Engine("w", Profile("p", 1.0, 0.0, 0.5, 0.25, running=2, slots=2))
    for number in (1, 2):
        engine.ask(Turn(_session(number), 100, 5, 0.0))
    times = []
    while engine.queue_length:
        engine.advance(engine.due())
        times.append(engine._at)
        engine.happen()
    # The second prompt shares its second with steps of 0.75 s, so the first answer grows by one
    # token meanwhile; then 3 tokens each at 1 s for both, and the last one alone at 0.75 s.
    assert times == pytest.approx([1.0, 2.75, 5.75, 6.5])


def test_slots_choose_as_the_engines_prefix_cache_does() -> None:
    draw = random.Random(1)
    ours, real = Slots(4), PrefixCache(4)
    going: list[tuple[Session, list[int]]] = []
    for number in range(3000):
        if len(going) < 8 or draw.random() < 0.2:
            picture = draw.choice([None, 0, 1])
            pixels = 10 + (picture if picture is not None else 90 + number)
            going = [*going[-11:], (_session(number, picture), [1] * 10 + [pixels] * 50)]
        session, text = draw.choice(going)
        text += [100_000 + session.number] * draw.randrange(2, 40)
        slot, cached = ours.acquire(session, len(text))
        lease = real.acquire(text)
        assert lease is not None
        assert cached == lease.num_cached
        text += [100_000 + session.number] * draw.randrange(1, 60)
        ours.release(slot, len(text) - 1)
        real.release(lease.slot, text[:-1])


def test_scale_command_tells_every_combination_and_plots_what_it_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, plot = tmp_path / "rows.json", tmp_path / "plot.svg"
    main(["--workers", "1,2", "--sessions", "100", "--profile", "cpu", "--json", str(told)])
    rows = json.loads(told.read_text("utf-8"))["rows"]
    assert [(row["policy"], row["workers"]) for row in rows][1:3] == [
        ("lottery", 2),
        ("shortest_queue", 1),
    ]
    assert all(row["asked"] == row["answered"] and not row["left"] for row in rows)
    main(["--read", str(told), "--plot", str(plot)])
    assert capsys.readouterr().out.count("| cache_aware | 2 | 100 |") == 2
    circles = ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(circles)) == 3 * len(rows)


def test_scale_command_simulates_a_million_conversations_on_a_thousand_workers() -> None:
    asked = parser().parse_args(["--workers", "1,1000", "--policy", "lottery", "--profile", "cpu"])
    assert [plan.sessions for plan in plans(asked)] == [10_000, 1_000_000]
    asked.sessions = 20_000
    assert [plan.sessions for plan in plans(asked)] == [20_000, 20_000]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--policy", "round_robin"), ("--workers", "0"), ("--sessions", "3"), ("--load", "nan")],
)
def test_scale_command_refuses_what_cannot_be_simulated(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([option, value])
    assert option in capsys.readouterr().err


def test_costs_are_taken_of_choices_that_find_who_knows_the_conversation() -> None:
    registry, requests = full_registry("cache_aware", 5)
    found = 0
    for request in requests:
        with registry.lease("m", [*request, f"new to {request[-1]}"]) or pytest.fail(
            "none"
        ) as lease:
            found += lease.worker.name == f"w{int(request[-1][:6], 16)}"
    assert found > 0.9 * len(requests) == 0.9 * 5 * CONVERSATIONS


def test_costs_of_a_controller_add_up() -> None:
    assert controller_cores(10, 1000, 20) == 10 * REQUEST_S + 1000 * TOKEN_S + 20 * BEAT_S
