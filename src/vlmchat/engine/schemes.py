"""How a checkpoint's weights are stored quantised, by the `quantization_config` of its config.

Asked before a download and by the loader. Plain Python: no torch, no tensor is read. Which layers
are quantised is not told here: their tensors say so by their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmchat.errors import UnsupportedModel

METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq")
_BITS = {"awq": (4,), "gptq": (2, 4, 8)}
_ADVICE = "take its full weights, with --load-8bit or --load-4bit"
# Formats of compressed-tensors whose tensors are whole numbers or float8, with their scales.
_FORMATS = (
    *("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "dense"),
    "mixed-precision",
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way in which weights are stored.

    bits: per weight; 0 where the tensors tell.  group_size: inputs that share a scale, -1 for all
    of them, 0 where the tensors tell.  zeros_less_one: zero points are stored as one less.
    """

    method: str
    bits: int = 0
    group_size: int = 0
    zeros_less_one: bool = False

    @property
    def words(self) -> str:
        """For people: "GPTQ, 4 bits"."""
        name = self.method if self.method in ("bitsandbytes", "compressed-tensors") else ""
        return f"{name or self.method.upper()}, {self.bits} bits" if self.bits else name or "FP8"


def read_scheme(config: Mapping[str, Any], name: str) -> Scheme | None:
    """None for weights that are not quantised.

    name: what messages call the checkpoint. Raises UnsupportedModel, with the setting that is not
    served.
    """
    stored = config.get("quantization_config") or _of_text(config).get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, dict):
        raise _refusal(name, f"with a quantization_config that is no object: {stored!r}")
    method = str(stored.get("quant_method") or _old_method(stored))
    if method not in METHODS:
        raise _refusal(name, f"by {method}, served are {', '.join(METHODS)}")
    if method == "bitsandbytes":
        return Scheme(method, 4 if stored.get("load_in_4bit") else 8)
    if method == "compressed-tensors":
        return _compressed(stored, name)
    if method == "fp8":
        return Scheme(method)
    return _by_layer(method, stored, name)


def _by_layer(method: str, stored: Mapping[str, Any], name: str) -> Scheme:
    """AWQ and GPTQ: layer by layer, whole numbers packed into 32 bits."""
    bits, group = stored.get("bits", stored.get("w_bit")), stored.get("group_size", -1)
    if bits not in _BITS[method]:
        raise _refusal(name, f"by {method} in {bits!r} bits")
    group = stored.get("q_group_size", group)
    if not isinstance(group, int) or (group < 1 and group != -1):
        raise _refusal(name, f"by {method} with group_size {group!r}")
    version = str(stored.get("version") or "gemm").lower()
    if method == "awq" and version != "gemm":
        raise _refusal(name, f"by AWQ in the layout {version!r}; served is gemm")
    layout = str(stored.get("checkpoint_format") or stored.get("format") or "gptq").lower()
    if method == "gptq" and layout not in ("gptq", "gptq_v2"):
        raise _refusal(name, f"by GPTQ in the layout {layout!r}; served are gptq and gptq_v2")
    for pattern, change in (stored.get("dynamic") or {}).items():
        if not str(pattern).startswith("-") and set(change or ()) & {"bits", "group_size"}:
            raise _refusal(name, f"by GPTQ with other settings for {pattern}")
    return Scheme(method, bits, group, method == "gptq" and layout == "gptq")


def _compressed(stored: Mapping[str, Any], name: str) -> Scheme:
    groups = (stored.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups if isinstance(group, dict)]
    formats = {stored.get("format")} | {g.get("format") for g in groups if isinstance(g, dict)}
    if strange := sorted(str(each) for each in formats - {None, *_FORMATS}):
        raise _refusal(name, f"by compressed-tensors as {strange[0]}")
    sparse = (stored.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense" or stored.get("transform_config"):
        raise _refusal(name, "by compressed-tensors, sparse or transformed")
    bits = {each.get("num_bits") for each in weights}
    if strange := sorted(str(each) for each in bits - {2, 4, 8}):
        raise _refusal(name, f"by compressed-tensors in {strange[0]} bits")
    return Scheme("compressed-tensors", int(bits.pop() or 0) if len(bits) == 1 else 0)


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part = config.get("text_config")
    return part if isinstance(part, dict) else {}


def _old_method(stored: Mapping[str, Any]) -> str:
    """Of configs that name no method, as transformers takes them."""
    return "bitsandbytes" if "load_in_4bit" in stored or "load_in_8bit" in stored else "unknown"


def _refusal(name: str, how: str) -> UnsupportedModel:
    return UnsupportedModel(f"{name} is stored quantised {how}, which is not served; {_ADVICE}")
