"""Fused layers give what the layers give, and hold no second copy of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from vlmchat.engine.fused import fuse
from vlmchat.engine.packed import PrepackedLinear, can_prepack, int4_linear, int8_linear

BFLOAT16 = torch.bfloat16
BIASES = [(False,) * 3, (True,) * 3, (True, False, True)]


def linears(biases: Sequence[bool], dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(0)
    pairs = zip((128, 64, 64), biases, strict=True)
    made = [nn.Linear(32, size, bias=bias, dtype=dtype) for size, bias in pairs]
    return [layer.requires_grad_(False) for layer in made]


def int4(biases: Sequence[bool], dtype: torch.dtype = BFLOAT16) -> list[nn.Module]:
    return [int4_linear(each.weight, dtype, each.bias) for each in linears(biases, dtype)]


def int8(biases: Sequence[bool], dtype: torch.dtype = BFLOAT16) -> list[nn.Module]:
    return [int8_linear(each.weight, dtype, each.bias) for each in linears(biases, dtype)]


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("make", [linears, int4, int8])
@pytest.mark.parametrize("num_rows", [1, 50])
def test_fused_layers_give_the_outputs_of_all(
    make: Callable[..., list[nn.Module]],
    biases: tuple[bool, ...],
    dtype: torch.dtype,
    num_rows: int,
) -> None:
    layers = make(biases, dtype)
    x = torch.randn(num_rows, 32, dtype=dtype)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(fuse(layers)(x), expected)


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        (linears(BIASES[2]), "weight"),
        (int4(BIASES[2]), "scales_zeros"),
        (int8(BIASES[2]), "scales"),
    ],
)
def test_fused_layers_go_on_with_views_of_the_joint_weights(
    layers: list[nn.Module], name: str
) -> None:
    x = torch.randn(2, 32, dtype=torch.float32 if name == "weight" else BFLOAT16)
    expected = [layer(x) for layer in layers]
    fused = fuse(layers)
    for tensor in ("weight", name):
        places = {getattr(each, tensor).untyped_storage().data_ptr() for each in [fused, *layers]}
        assert len(places) == 1
    for layer, output in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer(x), output)


@pytest.mark.skipif(not can_prepack(torch.empty(1, dtype=BFLOAT16)), reason="no oneDNN product")
@pytest.mark.parametrize("count", [1, 3])
def test_fused_layers_in_bfloat16_leave_their_weights_to_onednn(count: int) -> None:
    layers = linears(BIASES[0], BFLOAT16)[:count]
    fused = fuse(layers)
    assert isinstance(fused, PrepackedLinear)
    assert all(layer.weight.is_meta for layer in layers)


class Doubled(nn.Linear):
    """Not a plain linear layer: its weights alone do not tell what it gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param([Doubled(32, 4), nn.Linear(32, 8)], id="another kind"),
        pytest.param([nn.Linear(32, 8), int8_linear(torch.ones(8, 32), torch.float32)], id="mixed"),
        pytest.param(
            [int4_linear(torch.randn(n, 32), torch.float32) for n in (64, 16)], id="with gaps"
        ),
    ],
)
def test_fused_layers_that_cannot_be_joined_are_called_in_turn(layers: list[nn.Module]) -> None:
    x = torch.randn(5, 32)
    torch.testing.assert_close(fuse(layers)(x), torch.cat([m(x) for m in layers], dim=-1))
