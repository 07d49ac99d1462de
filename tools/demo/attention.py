"""Attention written out in full: on a CPU its gradient is much cheaper than that of SDPA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "written_out"
FORBIDDEN = -1e4


def written_out(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Softmax of the scores; `attention_mask` is added to them and None allows everything."""
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores + attention_mask
    seen = torch.matmul(scores.softmax(-1), value)
    return seen.transpose(1, 2).contiguous(), None


def additive(allowed: Tensor) -> Tensor:
    """A mask to add to scores from one that is true where looking is allowed."""
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16)
    return mask.masked_fill_(~allowed, FORBIDDEN)


@contextmanager
def in_training(*models: PreTrainedModel) -> Iterator[None]:
    """Inside, the models use this attention; afterwards, their usual one."""
    AttentionInterface.register(NAME, written_out)
    for model in models:
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        for model in models:
            model.set_attn_implementation("sdpa")
