"""One product in place of several that take the same input: query, key, value; gate and up.

Called by the static runner once a model is loaded. A decode step is bound by reading weights and by
the calls around each product; three calls of which two are small cost more than one. Knows nothing
of models and of what its inputs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlmchat.engine.packed import TILE, Int4Linear, Int8Linear, PrepackedLinear, can_prepack


class _InTurn(nn.Module):
    """Layers whose forms cannot be joined, called one after the other."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., sum of out]."""
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


class Room:
    """Where weights are put together, to be copied then: fresh memory each time takes longer."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.bfloat16)

    def join(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """[out, in] each, bfloat16 -> [sum of out, in], until the next call."""
        count = sum(weight.numel() for weight in weights)
        if len(self._memory) < count:
            self._memory = weights[0].new_empty(count)
        return torch.cat(list(weights), out=self._memory[:count].view(-1, weights[0].shape[1]))


@torch.no_grad()
def fuse(layers: Sequence[nn.Module], room: Room | None = None) -> nn.Module:
    """A module that gives the layers' outputs, concatenated, for one input [..., in].

    No second copy of the weights stays: the layers go on with views of the joint ones. But where
    oneDNN keeps weights in an order of its own (bfloat16 on a CPU), they are left without theirs,
    which are then on the meta device; so it is for one layer alone. Layers whose forms cannot be
    joined are called in turn.
    """
    kind = type(layers[0])
    if len({_form(layer) for layer in layers}) == 1:
        if isinstance(layers[0], nn.Linear) and kind is nn.Linear and can_prepack(layers[0].weight):
            return _prepack(layers, room or Room())
        if len(layers) > 1 and kind in _JOIN and _can_join(layers):
            return _JOIN[kind](layers)
    return layers[0] if len(layers) == 1 else _InTurn(layers)


def _form(layer: Any) -> tuple[Any, ...]:
    """What layers must have in common to be joined."""
    weight = getattr(layer, "weight", None)
    of_tensor = (weight.dtype, weight.device) if isinstance(weight, torch.Tensor) else ()
    return (
        type(layer),
        getattr(layer, "in_features", None),
        getattr(layer, "group", None),
        *of_tensor,
    )


def _can_join(layers: Sequence[Any]) -> bool:
    """Joint 4-bit layers must fill the kernel's tiles, and have their inputs in one order."""
    if type(layers[0]) is not Int4Linear:
        return True
    first, *others = (layer.order for layer in layers)
    same = all(
        (order is None and first is None)
        or (order is not None and first is not None and torch.equal(order, first))
        for order in others
    )
    return same and not any(layer.out_features % TILE for layer in layers)


def _prepack(layers: Sequence[Any], room: Room) -> PrepackedLinear:
    weights = [layer.weight for layer in layers]
    weight = weights[0] if len(layers) == 1 else room.join(weights)
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    return PrepackedLinear(weight, _biases(layers))


def _join_plain(layers: Sequence[Any]) -> nn.Linear:
    weight, bias = _join(layers, "weight"), _biases(layers)
    joint = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    joint.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        joint.bias = nn.Parameter(bias, requires_grad=False)
    return joint.eval()


def _join_int8(layers: Sequence[Any]) -> Int8Linear:
    return Int8Linear(_join(layers, "weight"), _join(layers, "scales"), _biases(layers))


def _join_int4(layers: Sequence[Any]) -> Int4Linear:
    shape = sum(layer.out_features for layer in layers), layers[0].in_features
    weight, both = _join(layers, "weight"), _join(layers, "scales_zeros", dim=1)
    return Int4Linear(weight, both, shape, _biases(layers), layers[0].order)


_JOIN = {nn.Linear: _join_plain, Int8Linear: _join_int8, Int4Linear: _join_int4}


def _join(layers: Sequence[Any], name: str, dim: int = 0) -> torch.Tensor:
    """The layers' tensors of that name as one, of which they get views."""
    joint = torch.cat([getattr(layer, name).detach() for layer in layers], dim=dim)
    parts = torch.split(joint, [layer.out_features for layer in layers], dim=dim)
    for layer, part in zip(layers, parts, strict=True):
        own = name in layer._parameters
        setattr(layer, name, nn.Parameter(part, requires_grad=False) if own else part)
    return joint


def _biases(layers: Sequence[Any]) -> torch.Tensor | None:
    """[sum of out]: 0 where a layer has none; None if no layer has one."""
    found = next((layer.bias for layer in layers if layer.bias is not None), None)
    if found is None:
        return None
    none = found.new_zeros
    biases = [none(o.out_features) if o.bias is None else o.bias for o in layers]
    return torch.cat(biases).detach()
