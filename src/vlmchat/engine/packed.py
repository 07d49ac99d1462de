"""Linear layers whose weights lie in memory as a CPU reads them best: 4 bits, 8 bits, bfloat16.

Called while weights arrive (`quantize`), and to join layers (`fused`). A decode step is bound by
reading weights; the products here are torch's own, which read packed weights as they are. Knows
nothing of models.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

GROUP = 32  # weights along the input that share a scale, in 4 bits
KERNEL_GROUPS = (32, 64, 128, 256)  # Source: torch's _weight_int4pack_mm_for_cpu
TILE = 64  # rows that the kernel packs together, or a multiple of these
# Up to so many rows the packed product, which unpacks for every four of them, is the faster one;
# past that the weights are unpacked once. See docs/fidelity.md.
_PACKED_ROWS_INT4, _PACKED_ROWS_INT8 = 56, 10
_WEIGHTS_AT_ONCE = 2**18  # as many as stay in a core's cache while they are quantised
_REFINEMENTS = 2
_INT8_INPUTS = 16  # torch's kernel for 8 bits reads so many at once, also past the end
_ONEDNN_ROWS = 8  # what oneDNN lays weights out for; it takes any other number too


class Int4Linear(nn.Module):
    """y = x W^T + b, W in 4 bits: a scale and a zero for each group of inputs.

    weight: [out, in / 2] uint8, in the kernel's order.  scales_zeros: [in / group, out, 2] in the
    activations' dtype: w = (q - 8) * scale + zero.  Both with out and in filled up to what the
    kernel takes.  order: [in] of inputs, where groups are not of neighbours.
    """

    weight: torch.Tensor
    scales_zeros: torch.Tensor
    bias: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scales_zeros: torch.Tensor,
        shape: tuple[int, int],
        bias: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
    ) -> None:
        """shape: (out, in) as the model has them. See `pack_int4` for one of plain levels."""
        super().__init__()
        self.out_features, self.in_features = shape
        num_inputs = 2 * weight.shape[1]
        self.group = num_inputs // len(scales_zeros)
        self.register_buffer("weight", weight)
        self.register_buffer("scales_zeros", scales_zeros)
        self.register_buffer("bias", bias)
        self.register_buffer("order", order)
        self._fill = num_inputs - self.in_features
        self._tile = _tile()

    @property
    def plain(self) -> bool:
        """Inputs are as they come, in the order of AVX-512's kernel."""
        return self.order is None and not self._fill and self._tile == TILE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows[:, self.order]
        if self._fill:
            rows = F.pad(rows, (0, self._fill))
        y = self._product(rows.contiguous())[:, : self.out_features]
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        few = len(rows) <= _PACKED_ROWS_INT4 and rows.dtype is torch.bfloat16
        if few or self._tile is None:
            y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows, self.weight, self.group, self.scales_zeros.contiguous()
            )
            return y
        return rows @ self._unpacked(self._tile)

    def _unpacked(self, tile: int) -> torch.Tensor:
        """[in, out] in the activations' dtype, both filled up."""
        num_groups, out, _ = self.scales_zeros.shape
        weight = self.scales_zeros.new_empty(num_groups * self.group, out)
        _unpack(self.weight, tile, weight)
        scales, zeros = self.scales_zeros[:, None].unbind(-1)  # [groups, 1, out]
        by_group = weight.view(num_groups, self.group, out)
        torch.addcmul(zeros.contiguous(), by_group, scales.contiguous(), out=by_group)
        return weight


def pack_int4(
    levels: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group: int,
    bias: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> Int4Linear:
    """levels: [out, in], 0 to 15.  scales, zeros: [out, groups] in the activations' dtype.

    group: inputs in each, one of KERNEL_GROUPS; the last one may lack some.
    """
    num_outputs, num_inputs = levels.shape
    fill = (0, scales.shape[1] * group - num_inputs, 0, -num_outputs % TILE)
    both = torch.stack([scales, zeros], dim=-1).transpose(0, 1)  # [groups, out, 2]
    both = F.pad(both, (0, 0, 0, fill[3])).contiguous()
    return Int4Linear(_pack(F.pad(levels, fill)), both, (num_outputs, num_inputs), bias, order)


def _pack(levels: torch.Tensor) -> torch.Tensor:
    """[out, in], 0 to 15, as [out, in / 2] uint8 in the kernel's order, which CPUs differ in."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        levels.to(torch.int32).contiguous(), 1
    )
    return packed


def _unpack(packed: torch.Tensor, tile: int, into: torch.Tensor) -> None:
    """Write the levels, less 8, into [in, out]. tile: see `_tile`."""
    half, num_inputs = tile // 2, into.shape[0]
    # In two's complement a shift to the right keeps the sign, and gives q - 8.
    signed = (packed ^ 0x88).view(torch.int8).view(-1, num_inputs, half).transpose(0, 1)
    tiles = into.view(num_inputs, -1, 2, half)
    tiles[:, :, 0] = (signed << 4) >> 4
    tiles[:, :, 1] = signed >> 4


def _tile() -> int | None:
    """How many rows the kernel packs together: half of them into the low 4 bits of its bytes.

    64 with AVX-512, 32 with AVX2; None where it has another order, which we do not unpack.
    """
    levels = (torch.arange(TILE * 32) * 7 % 31 % 16).view(TILE, 32)
    for tile in (64, 32):
        found = torch.empty(32, TILE, dtype=torch.int64)
        _unpack(_pack(levels), tile, found)
        if torch.equal(found.T + 8, levels):
            return tile
    return None


class Int8Linear(nn.Module):
    """y = x W^T + b, W in 8 bits with a scale for each output.

    weight: [out, in] int8.  scales: [out] in the activations' dtype.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features)
        few = len(rows) <= _PACKED_ROWS_INT8 and x.dtype is torch.bfloat16
        if few and self.in_features % _INT8_INPUTS == 0:
            y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.scales)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)).mul_(self.scales)
        if self.bias is not None:
            y += self.bias
        out: torch.Tensor = y.view(*x.shape[:-1], self.out_features)
        return out


class PrepackedLinear(nn.Module):
    """y = x W^T + b in bfloat16, W once brought into oneDNN's own order instead of at each call."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """weight: [out, in] bfloat16; it may be given up afterwards."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Opaque: no buffer, which torch would try to copy and to save.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ONEDNN_ROWS)
        self.register_buffer("bias", bias)

    @property
    def address(self) -> int:
        """Where the weights lie."""
        return int(torch.ops.mkldnn.data_ptr(self._weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self.bias, "none", [], ""
        )
        return y


def can_prepack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a fast product for such weights here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def int4_linear(
    weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None
) -> Int4Linear:
    """A layer of 4-bit weights. weight: [out, in] of any floating dtype; dtype: of activations."""
    levels, scales, zeros = quantize_groups(weight, GROUP, dtype)
    return pack_int4(levels, scales, zeros, GROUP, bias)


def int8_linear(
    weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None
) -> Int8Linear:
    """A layer of 8-bit weights. weight: [out, in] of any floating dtype; dtype: of activations."""
    exact = weight.float()
    scales = (exact.abs().amax(dim=1) / 127).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    levels = (exact / scales.float()[:, None]).round_().clamp_(-127, 127)
    return Int8Linear(levels.to(torch.int8), scales, bias)


def quantize_groups(
    weight: torch.Tensor, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels [out, in] uint8, scales and zeros [out, groups] in `dtype`, of a weight [out, in]."""
    rows = max(_WEIGHTS_AT_ONCE // weight.shape[1], 1)
    parts = [_quantize_rows(part, group, dtype) for part in torch.split(weight, rows)]
    levels, scales, zeros = (torch.cat(each) for each in zip(*parts, strict=True))
    return levels[:, : weight.shape[1]], scales, zeros


def _quantize_rows(
    weight: torch.Tensor, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First the levels go from a group's least weight to its greatest; then, by turns, scale and
    zero become the best for the levels (least squares), and the levels the nearest for these."""
    padded = F.pad(weight.float(), (0, -weight.shape[1] % group))
    groups = padded.reshape(len(weight), -1, group)
    least, greatest = groups.aminmax(dim=-1, keepdim=True)
    tiny = torch.finfo(dtype).tiny
    scales = ((greatest - least) / 15).clamp_(min=tiny)
    zeros = least + 8 * scales
    mean = groups.mean(dim=-1, keepdim=True)
    for _ in range(_REFINEMENTS):
        levels = (groups - zeros).div_(scales).round_()
        middle = levels.mean(dim=-1, keepdim=True)
        levels -= middle
        spread = levels.square().sum(dim=-1, keepdim=True).clamp_(min=tiny)
        scales = ((levels * groups).sum(dim=-1, keepdim=True) / spread).clamp_(min=tiny)
        zeros = mean - middle * scales
    # Rounded before the levels are chosen, so that these make up for it.
    scales, zeros = scales.to(dtype), zeros.to(dtype)
    levels = (groups - zeros.float()).div_(scales.float()).round_().add_(8).clamp_(0, 15)
    return levels.to(torch.uint8).flatten(1), scales[..., 0], zeros[..., 0]
