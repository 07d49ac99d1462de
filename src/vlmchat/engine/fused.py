"""One product in place of several that take the same input: query, key, value; gate and up.

Called by the static runner once a model is loaded. A decode step is bound by reading weights and by
the calls around each product; three calls of which two are small cost more than one. Knows nothing
of models and of what its inputs are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class _InTurn(nn.Module):
    """Layers whose forms cannot be joined, called one after the other."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., sum of out]."""
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def fuse(layers: Sequence[nn.Module]) -> nn.Module:
    """A module that gives the layers' outputs, concatenated, for one input [..., in].

    Weights of plain linear layers are joined, and the layers go on with views of the joint tensor:
    no second copy stays. Layers of any other kind are kept and called in turn.
    """
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    if len(plain) == len(layers) and len({_kind(layer) for layer in plain}) == 1:
        return _join(plain)
    return _InTurn(layers)


def _kind(linear: nn.Linear) -> tuple[int, torch.dtype, torch.device]:
    return linear.in_features, linear.weight.dtype, linear.weight.device


@torch.no_grad()
def _join(linears: Sequence[nn.Linear]) -> nn.Linear:
    """A linear layer over the joint weights. Where some have a bias, the others' is 0."""
    weight = torch.cat([linear.weight for linear in linears])
    biased = any(linear.bias is not None for linear in linears)
    joint = nn.Linear(linears[0].in_features, len(weight), bias=biased, device="meta")
    joint.weight = nn.Parameter(weight, requires_grad=False)
    if biased:
        bias = torch.cat([_bias(linear) for linear in linears])
        joint.bias = nn.Parameter(bias, requires_grad=False)
    start = 0
    for linear in linears:
        stop = start + linear.out_features
        linear.weight = nn.Parameter(joint.weight[start:stop], requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(joint.bias[start:stop], requires_grad=False)
        start = stop
    return joint.eval()


def _bias(linear: nn.Linear) -> torch.Tensor:
    if linear.bias is not None:
        return linear.bias
    return linear.weight.new_zeros(linear.out_features)
