"""Draw the next token from logits: greedy, or temperature, then top-k, then top-p.

The order is that of transformers' logits warpers. Called by the engine for each sequence.
"""

from __future__ import annotations

import torch

from vlmchat.errors import UnsupportedModel
from vlmchat.request import SamplingParams


class Sampler:
    """The random state of one sequence. Its draws depend on its seed and its logits only."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """logits: [vocabulary], any dtype and device. Greedy takes the first of equals.

        Raises UnsupportedModel when they are not numbers, as after an overflow in float16.
        """
        if logits.isnan().any():
            raise UnsupportedModel(
                "the model's output is not a number; its weights may be broken, or another --dtype "
                "may hold them (bfloat16, float32)"
            )
        if self._params.temperature == 0:
            return int(logits.argmax())
        # The best one becomes 0, in double: no temperature, however small, makes it infinite.
        scores = logits.cpu().double()
        scores = (scores - scores.max()) / self._params.temperature
        scores = self._top_p(self._top_k(scores))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def rank(self, logits: torch.Tensor, token: int) -> list[tuple[int, float]]:
        """(id, logprob) of `token`, then of the likeliest ones as `params.logprobs` says."""
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(self._params.logprobs or 0, logprobs.numel()))
        ids = [token, *top.indices.tolist()]
        return list(zip(ids, logprobs[ids].tolist(), strict=True))

    def _top_k(self, scores: torch.Tensor) -> torch.Tensor:
        k = min(self._params.top_k, scores.numel())
        if k == 0:
            return scores
        return scores.masked_fill(scores < scores.topk(k).values[-1], -torch.inf)

    def _top_p(self, scores: torch.Tensor) -> torch.Tensor:
        if self._params.top_p >= 1.0:
            return scores
        ordered, order = scores.sort(descending=False)
        # The least likely tokens go while their sum is within 1 - top_p; the best one stays.
        remove = ordered.softmax(-1).cumsum(-1) <= 1.0 - self._params.top_p
        remove[-1] = False
        return scores.masked_fill(torch.empty_like(remove).scatter_(0, order, remove), -torch.inf)
