"""The bench measures what it says, over any backend and through the program."""

from __future__ import annotations

import pytest

from tests.fakes import ScriptedBackend
from vlmchat.bench import Bounds, Plan, Questions, measure
from vlmchat.errors import ConfigError

BOUNDS = Bounds(
    bytes_s=100.0,
    flops_s=1000.0,
    weight_bytes=50,
    kv_bytes=1,
    token_flops=10.0,
    attention_flops=0.0,
    picture_flops=500.0,
)


def test_questions_are_all_new_and_of_the_size_asked_for() -> None:
    questions = Questions(ScriptedBackend(["yes"]), tokens=20, image=True)
    first, second = questions.next(), questions.next()
    assert first.pending is not None
    assert second.pending is not None
    assert len(first.pending.text.split()) == 20
    assert first.pending.text != second.pending.text
    assert first.images != second.images


def test_measure_gives_both_turns_of_every_width() -> None:
    backend = ScriptedBackend(["one two three four"] * 40)
    plan = Plan((5,), (4,), (1, 2), runs=1, image=False)
    figures = list(measure(backend, plan))
    assert [(figure.width, figure.turn) for figure in figures] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(figure.new_tokens == 4 for figure in figures)
    assert figures[1].prompt_tokens > figures[0].prompt_tokens


def test_bound_of_a_prefill_counts_new_tokens_and_pictures() -> None:
    assert BOUNDS.prefill_s(100, cached=0, pictures=1) == 1.5
    assert BOUNDS.prefill_s(100, cached=99) == 0.5  # the weights are read once anyhow


def test_bound_of_a_step_reads_weights_once_and_each_streams_keys() -> None:
    assert BOUNDS.decode_s(position=25, width=1) == 0.75
    assert BOUNDS.decode_s(position=25, width=2) == 1.0


@pytest.mark.parametrize("plan", [Plan(widths=()), Plan(runs=0), Plan(new_tokens=(1,))])
def test_plan_refuses_numbers_that_make_no_sense(plan: Plan) -> None:
    with pytest.raises(ConfigError):
        plan.check()
