"""Weights as other tools store them quantised, written from their formats' descriptions.

For each way: a weight [out, in] -> its tensors by the ends of their names, and what they stand for.
Used by the tests of loading; knows nothing of how this is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

GROUP = 32
Written = tuple[dict[str, torch.Tensor], torch.Tensor]


def words(levels: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words, the first number in the lowest bits, along `dim`."""
    levels = levels.long().movedim(dim, -1)
    fill = -levels.shape[-1] % (32 // bits)
    padded = torch.nn.functional.pad(levels, (0, fill))
    parts = padded.reshape(len(padded), -1, 32 // bits)
    packed: torch.Tensor = (parts << torch.arange(0, 32, bits)).sum(dim=-1)
    return packed.view(torch.int32)[..., ::2].movedim(-1, dim).contiguous()


def levels_of(
    weight: torch.Tensor, bits: int, groups: torch.Tensor, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels [out, in] from 0 on, scales [out, groups] in float16, zero points [out, groups]."""
    top, count = 2**bits - 1, int(groups.max()) + 1
    members = [weight[:, groups == g] for g in range(count)]
    low = torch.stack([m.amin(dim=1) for m in members], dim=1).clamp(max=0)
    high = torch.stack([m.amax(dim=1) for m in members], dim=1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        scales, zeros = (2 * high / top).half(), torch.full_like(high, (top + 1) // 2).long()
    else:
        scales = ((high - low) / top).half()
        zeros = (-low / scales.float()).round().clamp(1, top).long()
    wide, middle = scales.float()[:, groups], zeros[:, groups]
    levels = ((weight / wide).round() + middle).clamp(0, top).long()
    return levels, scales, zeros


def exact(
    levels: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    return (levels - zeros[:, groups]).float() * scales.float()[:, groups]


def neighbours(width: int, size: int = GROUP) -> torch.Tensor:
    return torch.arange(width) // (width if size < 0 else size)


def gptq(
    weight: torch.Tensor, bits: int = 4, size: int = GROUP, *, v1: bool = True, desc: bool = False
) -> Written:
    """Source: AutoGPTQ's QuantLinear.pack; v1 stores zero points less one."""
    groups = neighbours(weight.shape[1], size)
    if desc:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(5))]
    levels, scales, zeros = levels_of(weight, bits, groups, symmetric=False)
    tensors = {
        "qweight": words(levels.T, bits, 0),
        "qzeros": words(zeros.T - int(v1), bits, 1),
        "scales": scales.T.contiguous(),
        "g_idx": groups.int(),
    }
    return tensors, exact(levels, scales, zeros, groups)


def gptq_rows(weight: torch.Tensor) -> Written:
    """8 bits, a scale for each output, as `sym` has it."""
    groups = neighbours(weight.shape[1], -1)
    levels, scales, zeros = levels_of(weight, 8, groups, symmetric=True)
    tensors = {
        "qweight": words(levels.T, 8, 0),
        "qzeros": words(zeros.T - 1, 8, 1),
        "scales": scales.T.contiguous(),
        "g_idx": groups.int(),
    }
    return tensors, exact(levels, scales, zeros, groups)


def awq(weight: torch.Tensor) -> Written:
    """Source: AutoAWQ's WQLinear_GEMM.from_linear, whose words hold 8 columns in this order."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    groups = neighbours(weight.shape[1])
    levels, scales, zeros = levels_of(weight, 4, groups, symmetric=False)

    def interleaved(columns: torch.Tensor) -> torch.Tensor:
        return words(columns.reshape(len(columns), -1, 8)[..., order].flatten(1), 4, 1)

    tensors = {
        "qweight": interleaved(levels.T),
        "qzeros": interleaved(zeros.T),
        "scales": scales.T.contiguous(),
    }
    return tensors, exact(levels, scales, zeros, groups)


def packed(weight: torch.Tensor, *, symmetric: bool = True, act_order: bool = False) -> Written:
    """compressed-tensors' pack-quantized."""
    groups = neighbours(weight.shape[1])
    if act_order:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(5))]
    levels, scales, zeros = levels_of(weight, 4, groups, symmetric=symmetric)
    tensors = {
        "weight_packed": words(levels, 4, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros, 4, 0)
    if act_order:
        tensors["weight_g_idx"] = groups.int()
    return tensors, exact(levels, scales, zeros, groups)


def whole_numbers(weight: torch.Tensor) -> Written:
    """compressed-tensors' int-quantized, with scales of activations, which are not used."""
    scales = (weight.abs().amax(dim=1, keepdim=True) / 127).half()
    levels = (weight / scales.float()).round().clamp(-128, 127).to(torch.int8)
    tensors = {"weight": levels, "weight_scale": scales, "input_scale": torch.ones(1)}
    return tensors, levels.float() * scales.float()


def float8(weight: torch.Tensor) -> Written:
    """compressed-tensors' float-quantized, a scale for each output."""
    scales = weight.abs().amax(dim=1, keepdim=True) / 448
    stored = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scales}, stored.float() * scales


def blocks(weight: torch.Tensor) -> Written:
    """transformers' fine-grained float8: a scale for each block of 32 x 32."""
    tiles = weight.reshape(len(weight) // 32, 32, -1, 32)
    scales = tiles.abs().amax(dim=(1, 3)) / 448
    wide = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
    stored = (weight / wide).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scales}, stored.float() * wide


def bnb_4bit(weight: torch.Tensor, *, nested: bool = True, kind: str = "nf4") -> Written:
    """bitsandbytes' own."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    data, state = quantize_4bit(weight, compress_statistics=nested, quant_type=kind)
    stats = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": data, **stats}, dequantize_4bit(data, state).float()


def bnb_8bit(weight: torch.Tensor) -> Written:
    """LLM.int8: the largest weight of a row, and 127ths of it."""
    largest = weight.abs().amax(dim=1)
    levels = (weight * 127 / largest[:, None]).round().to(torch.int8)
    tensors = {
        "weight": levels,
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, levels.float() * largest[:, None] / 127


def _gptq_config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False} | more


def _compressed_config(form: str, bits: int, **more: Any) -> dict[str, Any]:
    """more: settings of the weights in place of those of symmetric groups."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": GROUP} | more
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*lm_head", "re:.*vision.*", "re:.*projector.*"],
    }


_ROWS = {"strategy": "channel", "group_size": None}
_AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "version": "gemm",
    "zero_point": True,
}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

# name -> the config's quantization_config, how a weight is written, the layer it becomes on a CPU.
WAYS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Written], str]] = {
    "gptq": (_gptq_config(), gptq, "Int4Linear"),
    "gptq-desc-act": (_gptq_config(desc_act=True), lambda w: gptq(w, desc=True), "Int4Linear"),
    "gptq-v2": (
        _gptq_config(checkpoint_format="gptq_v2"),
        lambda w: gptq(w, v1=False),
        "Int4Linear",
    ),
    "gptq-small-groups": (_gptq_config(group_size=16), lambda w: gptq(w, size=16), "Linear"),
    "gptq-whole-rows": (_gptq_config(group_size=-1), lambda w: gptq(w, size=-1), "Int4Linear"),
    "gptq-2-bits": (_gptq_config(bits=2), lambda w: gptq(w, 2), "Int4Linear"),
    "gptq-8-bits": (_gptq_config(bits=8), lambda w: gptq(w, 8), "Linear"),
    "gptq-8-bits-rows": (_gptq_config(bits=8, group_size=-1), gptq_rows, "Int8Linear"),
    "awq": (_AWQ, awq, "Int4Linear"),
    "packed": (_compressed_config("pack-quantized", 4), packed, "Int4Linear"),
    "packed-asymmetric": (
        _compressed_config("pack-quantized", 4, symmetric=False),
        lambda w: packed(w, symmetric=False),
        "Int4Linear",
    ),
    "packed-act-order": (
        _compressed_config("pack-quantized", 4, actorder="group"),
        lambda w: packed(w, act_order=True),
        "Int4Linear",
    ),
    "whole-numbers": (_compressed_config("int-quantized", 8, **_ROWS), whole_numbers, "Int8Linear"),
    "float8": (_compressed_config("float-quantized", 8, type="float", **_ROWS), float8, "Linear"),
    "blocks": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, blocks, "Linear"),
    "bnb-nf4": (_BNB, bnb_4bit, "Linear4bit"),
    "bnb-fp4": (_BNB, lambda w: bnb_4bit(w, nested=False, kind="fp4"), "Linear4bit"),
    "bnb-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_8bit, "Int8Linear"),
}
