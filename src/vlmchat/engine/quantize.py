"""Make bitsandbytes' 8-bit and 4-bit layers of a language model's linear layers.

Called as the weights arrive, so that a model never exists in 16 bits as a whole. The output head,
the projector and the vision tower keep their precision: they are small, and an answer about a
picture suffers most from them.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn


def quantized(
    linear: nn.Linear,
    weight: torch.Tensor,
    kind: str,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> Any:
    """A layer on `device` in place of `linear`, whose own weight may be on the meta device.

    weight: [out, in], of any floating dtype.
    kind: "8bit" (LLM.int8) or "4bit" (NF4 with double quantisation).
    """
    shape = linear.in_features, linear.out_features, linear.bias is not None
    layer: Any
    if kind == "8bit":
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
    _give_memory_back()
    if linear.bias is not None:
        layer.bias = linear.bias if linear.bias.is_meta else nn.Parameter(linear.bias.to(device))
    return layer


def _give_memory_back() -> None:
    """The C library keeps what is freed, here as much as the whole model in 16 bits."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others need it not
        if trim is not None:
            trim(0)
