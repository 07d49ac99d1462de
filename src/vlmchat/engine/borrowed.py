"""Weights left in their mapped file until a runner has brought them into its own order.

Marked by `assemble`, copied by the engine where no runner took them. Between the two nothing is
copied for a runner that is about to copy it anyway, which takes as long again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmchat.engine.packed import can_prepack

_MARK = "_vlmchat_borrowed"


def borrowed(module: nn.Module, tensor: torch.Tensor) -> nn.Parameter | None:
    """`tensor` as the module's weight, not copied; None where no runner would reorder it."""
    if type(module) is not nn.Linear or not can_prepack(tensor):
        return None
    weight = nn.Parameter(tensor, requires_grad=False)
    setattr(weight, _MARK, True)
    return weight


def borrowed_bytes(model: Any) -> int:
    """What is still to be copied, by a runner or by `take_over`."""
    return sum(p.nbytes for p in model.parameters() if hasattr(p, _MARK))


def take_over(model: Any) -> None:
    """Copy what is still borrowed: its file may be replaced while the model runs."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and hasattr(weight, _MARK):
            module._parameters["weight"] = nn.Parameter(weight.clone(), requires_grad=False)
