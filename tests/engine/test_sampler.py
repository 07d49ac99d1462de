"""Sampler: greedy, filters, seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmchat.engine.sampler import NOT_A_NUMBER, Sampler
from vlmchat.errors import InvalidRequest
from vlmchat.request import SamplingParams

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 1.4, -3.0])


def draws(params: SamplingParams, count: int = 300, logits: torch.Tensor = LOGITS) -> list[int]:
    """`count` tokens of one sequence whose logits never change."""
    sampler, found = Sampler(), []
    state = sampler.start(params)
    for _ in range(count):
        found += sampler.draw([state], [logits])
        state.advance(found[-1])
    return found


def test_sampler_takes_the_best_token_at_temperature_zero() -> None:
    assert set(draws(SamplingParams(temperature=0), 3)) == {1}


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_sampler_draws_the_best_token_at_a_tiny_temperature(temperature: float) -> None:
    assert set(draws(SamplingParams(temperature), 3)) == {1}


@pytest.mark.parametrize("params", [SamplingParams(0.0), SamplingParams(1.0, top_k=2)])
def test_sampler_tells_a_row_that_is_not_a_number_from_the_others(params: SamplingParams) -> None:
    sampler = Sampler()
    states = [sampler.start(params), sampler.start(SamplingParams(0.0))]
    assert sampler.draw(states, [LOGITS * torch.nan, LOGITS]) == [NOT_A_NUMBER, 1]


def test_sampler_repeats_itself_with_the_same_seed_and_not_with_another() -> None:
    first, again, other = (draws(SamplingParams(1.0, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (3, 1.0), (1, 1.0), (4, 0.5), (0, 0.01)])
def test_sampler_draws_just_the_tokens_that_transformers_leaves(top_k: int, top_p: float) -> None:
    scores = TemperatureLogitsWarper(0.8)(None, LOGITS[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    left = set(torch.nonzero(scores[0].isfinite()).flatten().tolist())
    assert set(draws(SamplingParams(0.8, top_p=top_p, top_k=top_k, seed=1), 2000)) == left


def test_sampler_leaves_as_many_of_equal_tokens_as_top_p_says() -> None:
    flat = torch.zeros(1000)
    drawn = set(draws(SamplingParams(1.0, top_p=0.9, seed=1), 5000, flat))
    assert 880 <= len(drawn) <= 900


def test_sampler_draws_as_often_as_the_probabilities_say() -> None:
    drawn = torch.tensor(draws(SamplingParams(1.0, seed=3), 4000))
    shares = torch.bincount(drawn, minlength=6) / 4000
    torch.testing.assert_close(shares, LOGITS.softmax(-1), atol=0.03, rtol=0)


WAYS = [
    SamplingParams(0.0),
    SamplingParams(1.0, seed=1),
    SamplingParams(0.7, top_k=3, seed=2),
    SamplingParams(1.3, top_p=0.8, seed=3),
    SamplingParams(1.0, top_k=4, top_p=0.6, seed=4, presence_penalty=1.0),
]


def test_sampler_draws_each_row_of_a_batch_as_alone() -> None:
    sampler = Sampler()
    states = [sampler.start(params) for params in WAYS]
    together = []
    for _ in range(50):
        together.append(sampler.draw(states, [LOGITS] * len(WAYS)))
        for state, token in zip(states, together[-1], strict=True):
            state.advance(token)
    assert list(map(list, zip(*together, strict=True))) == [draws(p, 50) for p in WAYS]


@pytest.mark.parametrize("params", WAYS)
def test_sampler_goes_on_behind_tokens_drawn_before(params: SamplingParams) -> None:
    whole = draws(params, 20)
    assert draws(replace(params, resume=tuple(whole[:8])), 12) == whole[8:]


def test_sampler_penalises_repetition_as_transformers() -> None:
    prompt, answer = [0, 1, 5], [3, 1]
    params = SamplingParams(0.0, repetition_penalty=1.7, resume=tuple(answer))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + answer]), LOGITS[None])
    adjusted = Sampler().start(params, prompt).adjusted(LOGITS)
    torch.testing.assert_close(adjusted, expected[0])


def test_sampler_takes_the_model_s_repetition_penalty_unless_the_request_has_one() -> None:
    prompt = [1]
    own, off = (
        Sampler(repetition_penalty=10.0).start(SamplingParams(0.0, repetition_penalty=p), prompt)
        for p in (None, 1.0)
    )
    assert Sampler().draw([own, off], [LOGITS, LOGITS]) == [3, 1]


def test_sampler_penalises_tokens_of_the_answer_by_presence_and_frequency() -> None:
    params = SamplingParams(
        0.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((0, 9.0),), resume=(1, 1, 3)
    )
    expected = LOGITS + torch.tensor([9.0, -1.0, 0, -0.75, 0, 0])
    adjusted = Sampler().start(params, [2, 1]).adjusted(LOGITS)
    torch.testing.assert_close(adjusted, expected)


def test_sampler_ranks_the_drawn_token_and_the_likeliest_ones() -> None:
    ranked = Sampler().rank(2, LOGITS, 4)
    expected = LOGITS.log_softmax(-1)
    assert [token for token, _ in ranked] == [4, 1, 3]
    assert [logprob for _, logprob in ranked] == pytest.approx(expected[[4, 1, 3]].tolist())


@pytest.mark.parametrize("params", [{"resume": (6,)}, {"logit_bias": ((-1, 1.0),)}])
def test_sampler_refuses_tokens_that_the_model_has_not(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="there is no token"):
        Sampler(vocab_size=6).start(SamplingParams(**params))
