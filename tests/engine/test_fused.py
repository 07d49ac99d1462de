"""Fused layers give what the layers give, and hold no second copy of their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmchat.engine.fused import fuse


def linears(biases: tuple[bool, ...], dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(0)
    sizes = (24, 8, 8)
    pairs = zip(sizes, biases, strict=True)
    return [nn.Linear(16, size, bias=bias, dtype=dtype) for size, bias in pairs]


@pytest.mark.parametrize("biases", [(False,) * 3, (True,) * 3, (True, False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_linear_gives_the_outputs_of_all(
    biases: tuple[bool, ...], dtype: torch.dtype
) -> None:
    layers = linears(biases, dtype)
    x = torch.randn(2, 3, 16, dtype=dtype)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(fuse(layers)(x), expected)


def test_fused_layers_go_on_with_views_of_the_joint_weights() -> None:
    layers = linears((True, False, True))
    expected = [layer.weight.clone() for layer in layers]
    fused = fuse(layers)
    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert storages == {fused.weight.untyped_storage().data_ptr()}
    for layer, weight in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.weight, weight)
    assert layers[1].bias is None


class Doubled(nn.Linear):
    """Not a plain linear layer: its weights alone do not tell what it gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_fused_layers_of_another_kind_are_called_in_turn() -> None:
    layers = [Doubled(16, 4), nn.Linear(16, 8)]
    x = torch.randn(5, 16)
    torch.testing.assert_close(fuse(layers)(x), torch.cat([m(x) for m in layers], dim=-1))
