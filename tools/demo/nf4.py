"""A rehearsal of 4-bit loading: decoder weights in NF4, gradients for the originals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BLOCK = 64
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
_END = 0.9677083
_positive = torch.special.ndtri(torch.linspace(_END, 0.5, 9)[:-1])
_negative = -torch.special.ndtri(torch.linspace(_END, 0.5, 8)[:-1])
_levels = torch.cat([_positive, _negative, torch.zeros(1)]).sort().values
LEVELS = _levels / _levels.abs().max()
_EDGES = (LEVELS[1:] + LEVELS[:-1]) / 2


def rounded(weight: Tensor) -> Tensor:
    """The weight as it comes back from NF4 with one scale per 64 values."""
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return (LEVELS[torch.bucketize(blocks / scale, _EDGES)] * scale).reshape(weight.shape)


@contextmanager
def rehearsal(decoder: nn.Module) -> Iterator[None]:
    """Inside, the decoder's linear layers compute with rounded weights."""
    layers = [layer for layer in decoder.modules() if isinstance(layer, nn.Linear)]
    originals = [layer.weight.data for layer in layers]
    for layer in layers:
        layer.weight.data = rounded(layer.weight.data)
    try:
        yield
    finally:
        for layer, weight in zip(layers, originals, strict=True):
            layer.weight.data = weight
