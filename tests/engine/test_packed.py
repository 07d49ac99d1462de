"""Packed layers give what their weights say, for any shape, in each dtype of activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlmchat.engine.packed import (
    PrepackedLinear,
    can_prepack,
    int4_linear,
    int8_linear,
    pack_int4,
    quantize_groups,
)

SHAPES = [(64, 64), (192, 96), (16, 32), (7, 50), (130, 200)]  # out, in
# Each row of a product is a sum over `in`; bfloat16 keeps 8 bits of it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def restored(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the 4-bit levels of a weight stand for."""
    levels, scales, zeros = quantize_groups(weight, 32, dtype)
    wide = [t.float().repeat_interleave(32, dim=1)[:, : weight.shape[1]] for t in (scales, zeros)]
    return (levels.float() - 8) * wide[0] + wide[1]


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    error = (found.float() - exact).norm() / exact.norm()
    assert float(error) < TOLERANCE[found.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5, 17, 60])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_linear_is_the_product_with_its_levels(
    shape: tuple[int, int], num_rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0]).to(dtype)
    x = torch.randn(num_rows, shape[1]).to(dtype)
    found = int4_linear(weight, dtype, bias)(x)
    assert found.dtype is dtype
    assert_near(found, x.float() @ restored(weight, dtype).T + bias.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_linear_is_near_the_exact_product(
    shape: tuple[int, int], num_rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0]).to(dtype)
    x = torch.randn(num_rows, shape[1]).to(dtype)
    found = int8_linear(weight, dtype, bias)(x)
    exact = x.float() @ weight.T + bias.float()
    assert float((found.float() - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize("make", [int4_linear, int8_linear])
def test_packed_linear_takes_any_leading_shape(make: type) -> None:
    torch.manual_seed(0)
    layer = make(torch.randn(64, 32), torch.bfloat16)
    x = torch.randn(2, 3, 32).bfloat16()
    found = layer(x)
    assert found.shape == (2, 3, 64)
    torch.testing.assert_close(found.view(6, 64), layer(x.view(6, 32)))


def test_int4_linear_takes_its_inputs_in_order() -> None:
    """As GPTQ writes layers with `desc_act`: groups are of inputs that lie apart."""
    torch.manual_seed(0)
    weight, x, order = torch.randn(64, 64), torch.randn(3, 64), torch.randperm(64)
    plain = int4_linear(weight, torch.float32)
    levels, scales, zeros = quantize_groups(weight, 32, torch.float32)
    permuted = torch.empty_like(x)
    permuted[:, order] = x
    layer = pack_int4(levels, scales, zeros, 32, order=order)
    torch.testing.assert_close(layer(permuted), plain(x))


def test_quantised_group_of_equal_weights_is_exact() -> None:
    weight = torch.full((64, 64), 0.25)
    torch.testing.assert_close(restored(weight, torch.bfloat16), weight, rtol=0, atol=0)


needs_onednn = pytest.mark.skipif(
    not can_prepack(torch.empty(1, dtype=torch.bfloat16)), reason="no oneDNN product in bfloat16"
)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 8, 17])
def test_prepacked_linear_is_the_plain_one(num_rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 200, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, num_rows, 96).bfloat16()
    found = PrepackedLinear(plain.weight, plain.bias)(x)
    assert_near(found, F.linear(x.float(), *(p.float() for p in plain.parameters())))
