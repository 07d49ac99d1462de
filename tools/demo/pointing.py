"""Training teaches two attention heads where to look, besides teaching the words of answers.

Finding "the red circle" among 144 patches from the loss of the words alone takes very long.  One
head of the second layer is told to look at the shapes that a question mentions, and one of the
third layer at the shapes that the answer is about (at the first token when there are none).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tools.demo.batching import Batch

HEADS = ((1, 0), (2, 0))


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
        scores = _scores(decoder, states[layer], layer, head, batch.positions)
        chosen = (scores.float() + mask.squeeze(1)).flatten(0, 1)[batch.pointing]
        right = chosen.masked_fill(~wanted, -1e4).logsumexp(-1)
        missed = chosen.logsumexp(-1) - right
        loss = loss + (missed * batch.weights).sum() / batch.weights.sum()
    return loss / len(HEADS)
