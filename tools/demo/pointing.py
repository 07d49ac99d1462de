"""Training teaches two attention heads where to look, besides teaching the words of answers.

Finding "the red circle" among 144 patches from the loss of the words alone takes very long.  One
head of the second layer is told to look at the shapes that a question mentions, and one of the
fourth layer at the shapes that the answer is about (at the first token when there are none).
Another one of the fourth layer spreads evenly over the first token and the middles of those shapes,
so that the share of the first token tells how many there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tools.demo.attention import FORBIDDEN
from tools.demo.batching import Batch

HEADS = ((1, 0), (3, 0))
COUNTING = (3, 1)


def _scores(decoder: Any, hidden: Tensor, layer: int, head: int, positions: Tensor) -> Tensor:
    """What that head computes before the softmax, [rows, length, length]."""
    block = decoder.layers[layer]
    width = block.self_attn.head_dim
    part = slice(head * width, (head + 1) * width)
    normed = block.input_layernorm(hidden)
    query = torch.nn.functional.linear(normed, block.self_attn.q_proj.weight[part])
    key = torch.nn.functional.linear(normed, block.self_attn.k_proj.weight[part])
    cos, sin = decoder.rotary_emb(hidden, positions)
    query, key = apply_rotary_pos_emb(query.unsqueeze(1), key.unsqueeze(1), cos, sin)
    scores: Tensor = torch.matmul(query, key.transpose(-1, -2)).squeeze(1) * width**-0.5
    return scores


def pointing_loss(decoder: Any, states: tuple[Tensor, ...], batch: Batch, mask: Tensor) -> Tensor:
    """Minus the logarithm of the attention that falls on the right places."""
    if not len(batch.pointing):
        return torch.zeros(())
    loss = torch.zeros(())
    for (layer, head), wanted in zip(HEADS, (batch.mentioned, batch.answered), strict=True):
        chosen = _chosen(decoder, states, batch, mask, layer, head)
        right = chosen.masked_fill(~wanted, FORBIDDEN).logsumexp(-1)
        loss = loss + _mean(chosen.logsumexp(-1) - right, batch.weights)
    chosen = _chosen(decoder, states, batch, mask, *COUNTING)
    right = (chosen * batch.counted).sum(-1) / batch.counted.sum(-1)
    # What even the best attention costs is taken off, so that zero means perfect.
    best = batch.counted.sum(-1).float().log()
    counting = _mean(chosen.logsumexp(-1) - right - best, batch.count_weights)
    return (loss + counting) / 3


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp_min(1.0)


def _chosen(
    decoder: Any, states: tuple[Tensor, ...], batch: Batch, mask: Tensor, layer: int, head: int
) -> Tensor:
    """The head's scores at the places that matter, [places, length]."""
    scores = _scores(decoder, states[layer], layer, head, batch.positions)
    return (scores.float() + mask.squeeze(1)).flatten(0, 1)[batch.pointing]
