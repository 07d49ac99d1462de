"""Sampler: greedy, filters, seeds."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlmchat.engine.sampler import Sampler
from vlmchat.errors import UnsupportedModel
from vlmchat.request import SamplingParams

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 1.4, -3.0])


def draws(params: SamplingParams, count: int = 300) -> list[int]:
    sampler = Sampler(params)
    return [sampler.draw(LOGITS) for _ in range(count)]


def test_sampler_takes_the_best_token_at_temperature_zero() -> None:
    assert set(draws(SamplingParams(temperature=0), 3)) == {1}


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_sampler_draws_the_best_token_at_a_tiny_temperature(temperature: float) -> None:
    assert set(draws(SamplingParams(temperature), 3)) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampler_refuses_what_is_not_a_number(temperature: float) -> None:
    with pytest.raises(UnsupportedModel, match="--dtype"):
        Sampler(SamplingParams(temperature)).draw(LOGITS * torch.nan)


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


def test_sampler_ranks_the_drawn_token_and_the_likeliest_ones() -> None:
    ranked = Sampler(SamplingParams(0.5, top_k=1, logprobs=2)).rank(LOGITS, 4)
    expected = LOGITS.log_softmax(-1)
    assert [token for token, _ in ranked] == [4, 1, 3]
    assert [logprob for _, logprob in ranked] == pytest.approx(expected[[4, 1, 3]].tolist())
