"""Make quantised layers of a language model's linear layers: packed for CPUs, or bitsandbytes'.

Called as the weights arrive, so that a model never exists in 16 bits as a whole. The output head,
the projector and the vision tower keep their precision: they are small, and an answer about a
picture suffers most from them.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from torch import nn

from vlmchat.engine.packed import int4_linear, int8_linear

PACKED = {"int4": int4_linear, "int8": int8_linear}  # for CPUs
KINDS = (*PACKED, "bnb-int8", "bnb-nf4")


def quantized(
    linear: nn.Linear,
    weight: torch.Tensor,
    kind: str,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> Any:
    """A layer on `device` in place of `linear`, whose own weight may be on the meta device.

    weight: [out, in], of any floating dtype.  kind: one of KINDS; bnb-int8 is LLM.int8, bnb-nf4 is
    NF4 with double quantisation.
    """
    if kind in PACKED:
        layer: Any = PACKED[kind](weight.to(device), compute_dtype)
    else:
        layer = _by_bitsandbytes(linear, weight, kind, device, compute_dtype)
    return in_place_of(linear, layer, device)


def in_place_of(linear: nn.Linear, layer: Any, device: torch.device) -> Any:
    """The layer with the bias of `linear`, which may be on the meta device; memory is tidied."""
    bias = linear.bias
    if bias is not None and not bias.is_meta:
        bias = nn.Parameter(bias.to(device))
    layer.bias = bias
    _give_memory_back()
    return layer


def _by_bitsandbytes(
    linear: nn.Linear,
    weight: torch.Tensor,
    kind: str,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> Any:
    import bitsandbytes as bnb  # here, since it takes a second that packed layers do not need

    shape = linear.in_features, linear.out_features, linear.bias is not None
    layer: Any
    if kind == "bnb-int8":
        layer = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
        # bitsandbytes quantises a half-precision weight when it is moved to its device.
        parameter = bnb.nn.Int8Params(weight.half(), requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(
            *shape,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        # bitsandbytes' packing for newer CPUs takes whole blocks only, and fails on others.
        layer.support_avx512bf16_for_cpu &= not (shape[0] % 64 or shape[1] % 32)
        parameter = bnb.nn.Params4bit(
            weight.to(compute_dtype),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
        )
    layer.weight = parameter.to(device)
    return layer


def _give_memory_back() -> None:
    """The C library keeps what is freed, here as much as the whole model in 16 bits."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others need it not
        if trim is not None:
            trim(0)
