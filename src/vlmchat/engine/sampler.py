"""Draw the next tokens from logits: penalties, bias and grammar, then greedy or by chance.

By chance means temperature, then top-k, then top-p, in the order of transformers' logits warpers.
Each draw depends on its seed, its place in the answer and its logits only: what else is in the
batch, guessing ahead, or going on with an answer begun elsewhere never changes it.
Called by the engine for all sequences of a step at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

import torch

from vlmchat.errors import InvalidRequest
from vlmchat.request import Grammar, SamplingParams

NOT_A_NUMBER = -1  # drawn where the logits are none, as after an overflow in float16


class GrammarMask(Protocol):
    """What form one answer must have, and how far it has come."""

    @property
    def finished(self) -> bool:
        """Nothing may follow: the answer ends."""

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [V] as given, but -inf where a token must not follow."""

    def advance(self, token: int) -> None:
        """A token was drawn."""


class SamplerState:
    """How one sequence is drawn, and what its draws depend on besides the newest logits."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], grammar: GrammarMask | None
    ) -> None:
        self.params = params
        self.grammar = grammar
        self.num_drawn = 0
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._prompt_ids = prompt_ids
        self._counts: torch.Tensor | None = None  # [V], of the answer's tokens
        self._prompted: torch.Tensor | None = None  # [V], whether the prompt holds them
        self._drawn: list[int] = []  # those not in `_counts` yet

    @property
    def _penalised(self) -> bool:
        p = self.params
        return p.repetition_penalty not in (None, 1) or bool(
            p.presence_penalty or p.frequency_penalty
        )

    def advance(self, token: int) -> None:
        """A token was drawn, here or elsewhere before."""
        self.num_drawn += 1
        if self._penalised:
            self._drawn.append(token)
        if self.grammar is not None:
            self.grammar.advance(token)

    def uniform(self) -> float:
        """In [0, 1): the chance of the next draw."""
        key = blake2b(f"{self._seed} {self.num_drawn}".encode(), digest_size=8).digest()
        return (int.from_bytes(key, "big") >> 11) / 2**53

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [V] after penalties, bias and grammar; a new tensor if they change anything."""
        if self._penalised:
            logits = self._penalties(logits.float())
        if self.params.logit_bias:
            ids, bias = zip(*self.params.logit_bias, strict=True)
            index = torch.tensor(ids, device=logits.device)
            added = torch.tensor(bias, device=logits.device, dtype=torch.float32)
            logits = logits.float().index_add(0, index, added)
        return logits if self.grammar is None else self.grammar.allowed(logits)

    def _penalties(self, logits: torch.Tensor) -> torch.Tensor:
        """Repetition as transformers' RepetitionPenaltyLogitsProcessor, the others as OpenAI's."""
        p = self.params
        if self._counts is None or self._prompted is None:
            self._counts = torch.zeros_like(logits)
            self._prompted = torch.zeros_like(logits, dtype=torch.bool)
            known = [token for token in set(self._prompt_ids) if token < len(logits)]
            self._prompted[known] = True
        if self._drawn:
            drawn = torch.tensor(self._drawn, device=logits.device)
            self._counts.index_add_(0, drawn, torch.ones_like(drawn, dtype=logits.dtype))
            self._drawn.clear()
        if p.repetition_penalty not in (None, 1):
            worse = torch.where(
                logits < 0, logits * p.repetition_penalty, logits / p.repetition_penalty
            )
            logits = torch.where(self._prompted | (self._counts > 0), worse, logits)
        return logits - p.frequency_penalty * self._counts - p.presence_penalty * (self._counts > 0)


@dataclass(frozen=True, slots=True)
class Sampler:
    """repetition_penalty: the model's own, where a request says nothing.

    make_grammar: the mask of a grammar; None: no request may have one.
    vocab_size: of the model; None: not known.
    """

    repetition_penalty: float = 1.0
    vocab_size: int | None = None
    make_grammar: Callable[[Grammar], GrammarMask] | None = None

    def start(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> SamplerState:
        """The state of a sequence that goes on behind `params.resume`.

        Raises InvalidRequest for tokens that the model has not, and for a grammar where the engine
        was given none.
        """
        tokens = (*params.resume, *(token for token, _ in params.logit_bias))
        if unknown := [t for t in tokens if t < 0 or t >= (self.vocab_size or t + 1)]:
            raise InvalidRequest(
                f"the model has {self.vocab_size} tokens, there is no token {unknown[0]}"
            )
        grammar = None
        if params.grammar is not None:
            if self.make_grammar is None:
                raise InvalidRequest(
                    "answers in a given form are not served here; leave the grammar out"
                )
            grammar = self.make_grammar(params.grammar)
        if params.repetition_penalty is None and self.repetition_penalty != 1:
            params = replace(params, repetition_penalty=self.repetition_penalty)
        state = SamplerState(params, prompt_ids, grammar)
        for token in params.resume:
            state.advance(token)
        return state

    def draw(self, states: Sequence[SamplerState], logits: Sequence[torch.Tensor]) -> list[int]:
        """One token for each row of logits [V], any dtype and device; NOT_A_NUMBER for a bad one.

        Greedy takes the first of equals.
        """
        rows = [state.adjusted(row) for state, row in zip(states, logits, strict=True)]
        drawn = [NOT_A_NUMBER] * len(rows)
        for draw in (_greedy, _plain, _filtered):
            chosen = [i for i, state in enumerate(states) if _way(state.params) is draw]
            if chosen:
                stacked = torch.stack([rows[i] for i in chosen])  # [R, V]
                tokens = draw([states[i] for i in chosen], stacked)
                for i, token in zip(chosen, tokens, strict=True):
                    drawn[i] = token
        return drawn

    def rank(self, count: int, logits: torch.Tensor, token: int) -> list[tuple[int, float]]:
        """(id, logprob) of `token`, then of the `count` likeliest, by the model's own logits."""
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(count, logprobs.numel()))
        ids = [token, *top.indices.tolist()]
        return list(zip(ids, logprobs[ids].tolist(), strict=True))


def _way(params: SamplingParams) -> Callable[[Sequence[SamplerState], torch.Tensor], list[int]]:
    if params.temperature == 0:
        return _greedy
    return _filtered if params.top_k or params.top_p < 1 else _plain


def _greedy(states: Sequence[SamplerState], logits: torch.Tensor) -> list[int]:
    best = logits.max(-1)  # what is not a number wins
    tokens: list[int] = best.indices.where(best.values.isfinite(), NOT_A_NUMBER).tolist()
    return tokens


def _plain(states: Sequence[SamplerState], logits: torch.Tensor) -> list[int]:
    weights, good = _weights(states, logits)
    tokens: list[int] = _pick(states, weights).where(good, NOT_A_NUMBER).tolist()
    return tokens


def _filtered(states: Sequence[SamplerState], logits: torch.Tensor) -> list[int]:
    """By top-k, then top-p. On a CPU, which sorts slowly, among those that can remain only."""
    weights, good = _weights(states, logits)
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)  # [R, 1]
    if weights.device.type != "cpu":
        tokens = _nucleus(states, weights, total)
    else:
        found = []
        for state, row, sum_ in zip(states, weights, total, strict=True):
            ids = (row >= _least(state.params, row)).nonzero()[:, 0]
            found.append(ids[_nucleus([state], row[None, ids], sum_[None])])
        tokens = torch.cat(found)
    drawn: list[int] = tokens.where(good, NOT_A_NUMBER).tolist()
    return drawn


def _least(params: SamplingParams, weights: torch.Tensor) -> float:
    """A weight below which top-k and top-p leave none. weights: [V], of which the best is 1.

    The sum of all those below (1 - top_p) / V is within what top-p takes away.
    """
    least = (1 - params.top_p) / len(weights)
    if 0 < params.top_k < len(weights):
        least = max(least, float(weights.topk(params.top_k).values[-1]))
    return least


def _nucleus(
    states: Sequence[SamplerState], weights: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """[R]: one index for each row of weights [R, N]. total: [R, 1], also of those left out."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    top_k = _column(states, weights, lambda p: min(p.top_k or 1, weights.shape[-1])).long()
    limited = _column(states, weights, lambda p: bool(p.top_k)).bool()
    # Equals of the last one stay, as in transformers.
    ordered = ordered.where(~limited | (ordered >= ordered.gather(-1, top_k - 1)), 0)
    reached = ordered.cumsum(-1, dtype=total.dtype)
    wanted = _column(states, total, lambda p: p.top_p) * reached[:, -1:].where(limited, total)
    kept = reached - ordered < wanted  # a token goes if the likelier ones do already
    kept[:, 0] = True
    return order.gather(-1, _pick(states, ordered.where(kept, 0))[:, None])[:, 0]


def _weights(
    states: Sequence[SamplerState], logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, V]: probabilities at the temperatures, times such a number that the best one's is 1.

    [R]: whether they are numbers.
    """
    if logits.device.type == "mps":  # has no doubles
        logits = logits.cpu()
    logits = logits.float()
    best = logits.max(-1, keepdim=True).values
    coldest = torch.finfo(logits.dtype).tiny  # what is smaller would be 0, and 0 / 0 no number
    temperature = _column(states, logits, lambda p: max(p.temperature, coldest))
    weights = ((logits - best) / temperature).exp().nan_to_num_(1.0)
    return weights, best.isfinite()[:, 0]


def _pick(states: Sequence[SamplerState], weights: torch.Tensor) -> torch.Tensor:
    """[R]: one index for each row of weights [R, N]."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    chances = [[state.uniform()] for state in states]
    aim = torch.tensor(chances, dtype=sums.dtype, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, aim, right=True)[:, 0].clamp(max=sums.shape[-1] - 1)


def _column(
    states: Sequence[SamplerState], like: torch.Tensor, value: Callable[[SamplingParams], float]
) -> torch.Tensor:
    """[R, 1]: a setting of each row."""
    values = [[float(value(state.params))] for state in states]
    return torch.tensor(values, dtype=like.dtype, device=like.device)
