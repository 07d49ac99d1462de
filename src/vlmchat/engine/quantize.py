"""Replace a language model's linear layers by bitsandbytes' 8-bit or 4-bit ones.

Called by the loader once the weights are read. The output head, the projector and the vision
tower keep their precision: they are small, and an answer about a picture suffers most from them.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn


def quantize(model: Any, kind: str, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Quantise `model.language_model`'s linear layers in place, one by one, onto `device`.

    kind: "8bit" (LLM.int8) or "4bit" (NF4 with double quantisation). All other weights become
    `compute_dtype` where they are.
    """
    language_model = model.model.language_model
    for name, linear in list(language_model.named_modules()):
        if isinstance(linear, nn.Linear):
            replacement = _eight_bit(linear) if kind == "8bit" else _four_bit(linear, compute_dtype)
            language_model.set_submodule(name, replacement.to(device))
    for parameter in model.parameters():  # no buffers: rotary frequencies stay in float32
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute_dtype)


def _eight_bit(linear: nn.Linear) -> Any:
    replacement = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    # bitsandbytes quantises a half-precision weight when it is moved to its device.
    replacement.weight = bnb.nn.Int8Params(linear.weight.data.half(), requires_grad=False)
    replacement.bias = linear.bias
    return replacement


def _four_bit(linear: nn.Linear, compute_dtype: torch.dtype) -> Any:
    replacement = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    replacement.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    replacement.bias = linear.bias
    return replacement
