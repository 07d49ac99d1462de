"""Weights that a checkpoint stores quantised: found among its tensors, put together, given a layer.

Called where tensors are read. A module's parts are held until all have come, no longer; what they
make goes on under the name of the weight that it stands for. The numbers are the stored ones, not
rounded again: a packed layer where one takes them as they are, else plain weights.

Sources: the formats of AutoAWQ (gemm), AutoGPTQ and GPTQModel (v1, v2), compressed-tensors,
bitsandbytes' `QuantState.as_dict` and transformers' FineGrainedFP8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmchat.engine.packed import KERNEL_GROUPS, Int8Linear, pack_int4
from vlmchat.engine.schemes import Scheme
from vlmchat.engine.tensors import read_shapes, read_tensors
from vlmchat.errors import CheckpointError

Parts = Mapping[str, torch.Tensor]

# Written beside the weights for quantised activations and caches, which nothing here has.
_UNUSED = (
    *(".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".k_scale"),
    *(".v_scale", ".q_scale", ".output_zero_point", ".activation_scale", ".weight_format"),
)
# The part that tells a quantised module, by method; its name less this is the module's.
_MARKS = {
    "awq": (".qweight",),
    "gptq": (".qweight",),
    "compressed-tensors": (".weight_scale",),
    "fp8": (".weight_scale_inv",),
    "bitsandbytes": (".weight.absmax", ".SCB"),
}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 columns each 4 bits of a word hold
_SMALLEST_GROUP = KERNEL_GROUPS[0]


@dataclass(frozen=True, slots=True)
class Groupwise:
    """w = (level - zero) * scale.

    levels: [out, in] uint8.  scales, zeros: [out, groups] float32.  groups: [in], the group of
    each input.  bits: what the levels take.
    """

    levels: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor
    bits: int

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.levels.shape

    @property
    def kind(self) -> str:
        """The kind of layer that may take it as it is."""
        return "int4" if self.bits <= 4 else "int8"

    def float(self) -> torch.Tensor:
        """[out, in] in float32."""
        scales, zeros = self.scales[:, self.groups], self.zeros[:, self.groups]
        return (self.levels - zeros).mul_(scales)

    def layer(self, linear: Any, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """A packed layer with just these numbers, for a CPU; None where there is none such."""
        if device.type != "cpu":
            return None
        return self._int4(dtype) if self.kind == "int4" else self._int8(dtype)

    def _int4(self, dtype: torch.dtype) -> nn.Module | None:
        num_groups, num_inputs = self.scales.shape[1], self.shape[1]
        order = None
        if bool((self.groups.diff() < 0).any()):
            order = self.groups.argsort(stable=True)
        counts = self.groups.bincount(minlength=num_groups)
        size = int(counts[0])
        # What the kernel takes: groups of one size, but for the last, and not too small.
        part = next((g for g in reversed(KERNEL_GROUPS) if size % g == 0), None)
        if num_groups == 1 and part is None:
            size = part = _SMALLEST_GROUP
        elif part is None or bool((counts[:-1] != size).any()) or int(counts[-1]) > size:
            return None
        wide = -(-num_inputs // part)
        repeats = wide if num_groups == 1 else size // part
        scales = self.scales.repeat_interleave(repeats, dim=1)[:, :wide]
        zeros = (8 - self.zeros).mul_(self.scales).repeat_interleave(repeats, dim=1)[:, :wide]
        levels = self.levels if order is None else self.levels[:, order]
        return pack_int4(levels, scales.to(dtype), zeros.to(dtype), part, order=order)

    def _int8(self, dtype: torch.dtype) -> nn.Module | None:
        if self.scales.shape[1] > 1 or bool((self.zeros != 128).any()):
            return None
        levels = (self.levels ^ 128).view(torch.int8)  # less 128, in two's complement
        return Int8Linear(levels.contiguous(), self.scales[:, 0].to(dtype))


@dataclass(frozen=True, slots=True)
class BlockFloat8:
    """w = float8 * scale, a scale for each block of rows and columns.

    weight: [out, in].  scales: [blocks of out, blocks of in].
    """

    weight: torch.Tensor
    scales: torch.Tensor
    kind = "float8"

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.weight.shape

    def float(self) -> torch.Tensor:
        """[out, in] in float32."""
        scales = self.scales.float()
        for dim, size in enumerate(self.shape):
            if scales.shape[dim] not in (1, size):
                block = -(-size // scales.shape[dim])
                # The last block may be cut short; a block has a round number of rows.
                block = next((b for b in (32, 64, 128, 256) if b >= block), block)
                scales = scales.repeat_interleave(block, dim=dim).narrow(dim, 0, size)
        return self.weight.float().mul_(scales)

    def layer(self, linear: Any, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """None: there are no layers in float8 here."""
        return None


@dataclass(frozen=True, slots=True)
class Bnb4bit:
    """bitsandbytes' 4-bit weights, NF4 or FP4. data: packed; stats: the other tensors, by name."""

    data: torch.Tensor
    stats: dict[str, torch.Tensor]
    kind = "bnb-nf4"

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return torch.Size(self._state().shape)

    def float(self) -> torch.Tensor:
        """[out, in] in float32."""
        from bitsandbytes.functional import dequantize_4bit

        found: torch.Tensor = dequantize_4bit(self.data, self._state())
        return found.float()

    def layer(self, linear: Any, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """bitsandbytes' own layer over the same numbers."""
        import bitsandbytes as bnb

        shape = linear.in_features, linear.out_features, linear.bias is not None
        layer: Any = bnb.nn.Linear4bit(*shape, compute_dtype=dtype, device="meta")
        layer.support_avx512bf16_for_cpu &= not (shape[0] % 64 or shape[1] % 32)
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            data=self.data.clone(), quantized_stats=self.stats, device=device
        )
        return layer  # type: ignore[no-any-return]

    def _state(self) -> Any:
        from bitsandbytes.functional import QuantState

        return QuantState.from_dict(dict(self.stats), device=torch.device("cpu"))


StoredWeight = Groupwise | BlockFloat8 | Bnb4bit
NamedWeight = tuple[str, torch.Tensor | StoredWeight]


def read_weights(files: Iterable[Path], scheme: Scheme | None) -> Iterator[NamedWeight]:
    """Every tensor with its name; weights that are stored quantised as one value each.

    Raises CheckpointError for files as `read_tensors` does, and for parts that do not fit.
    """
    files = list(files)
    if scheme is None:
        yield from read_tensors(files)
        return
    modules = _modules(read_shapes(files), scheme)
    owner = {name: module for module, names in modules.items() for name in names}
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(files):
        module = owner.get(name)
        if module is None:
            if not name.endswith(_UNUSED):
                yield name, tensor
            continue
        parts = held.setdefault(module, {})
        parts[name[len(module) + 1 :]] = tensor
        if len(parts) == len(modules[module]):
            del held[module]
            yield f"{module}.weight", _joined(module, parts, scheme)


def plain(weight: torch.Tensor | StoredWeight) -> torch.Tensor:
    """The weight itself, in float32 where it was stored quantised."""
    return weight if isinstance(weight, torch.Tensor) else weight.float()


def kept_kind(scheme: Scheme | None, device: torch.device) -> str | None:
    """The kind of layers that most weights will be, if nothing else is asked for; None: plain."""
    if scheme is None:
        return None
    if scheme.method == "bitsandbytes" and scheme.bits == 4:
        return "bnb-nf4"
    if device.type != "cpu" or scheme.bits not in (2, 4, 8):
        return None
    whole_rows = scheme.method in ("bitsandbytes", "compressed-tensors") or scheme.group_size == -1
    return "int4" if scheme.bits <= 4 else "int8" if whole_rows else None


def _modules(names: Iterable[str], scheme: Scheme) -> dict[str, set[str]]:
    """The tensors of every quantised module, by its name."""
    names, marks = list(names), _MARKS[scheme.method]
    modules: dict[str, set[str]] = {
        name.removesuffix(mark): set() for name in names for mark in marks if name.endswith(mark)
    }
    for name in names:
        if name.endswith((".bias", *_UNUSED)):
            continue
        module = name.rpartition(".")[0]
        module = module if module in modules else module.partition(".weight")[0]
        if module in modules:
            modules[module].add(name)
    return modules


def _joined(module: str, parts: Parts, scheme: Scheme) -> StoredWeight:
    read: dict[str, Callable[[Parts, Scheme], StoredWeight]] = {
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed,
        "fp8": lambda found, _: BlockFloat8(found["weight"], found["weight_scale_inv"]),
        "bitsandbytes": _bitsandbytes,
    }
    try:
        return read[scheme.method](parts, scheme)
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        words = f"lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise CheckpointError(
            f"{module} is not as {scheme.words} stores it ({words}); download the checkpoint again"
        ) from error


def _unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """uint8 numbers out of int32 words [rows, columns], the lowest bits first, along `dim`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    apart = words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (1 - dim))
    numbers: torch.Tensor = (apart & (2**bits - 1)).to(torch.uint8)
    return numbers.flatten(dim, dim + 1)


def _groups(num_inputs: int, num_groups: int, size: int = 0) -> torch.Tensor:
    """[in]: groups of neighbours. size: of a group; -1 is all, 0 is what the numbers tell."""
    if size < 1:
        size = -(-num_inputs // num_groups)
    return (torch.arange(num_inputs) // size).clamp_(max=num_groups - 1)


def _gptq(parts: Parts, scheme: Scheme) -> Groupwise:
    """qweight: [in / n, out]; qzeros: [groups, out / n]; scales: [groups, out]; g_idx: [in]."""
    bits, zeros = scheme.bits, parts["qzeros"]
    if scheme.zeros_less_one:  # as whole words: what overflows went into the next number
        zeros = zeros + sum(1 << shift for shift in range(0, 32, bits))
    levels = _unpacked(parts["qweight"], bits, 0).T
    scales = parts["scales"].float().T
    groups = parts.get("g_idx")
    if groups is None or not groups.numel():
        groups = _groups(levels.shape[1], scales.shape[1], scheme.group_size)
    unpacked = _unpacked(zeros, bits, 1).T[: scales.shape[0]]
    return Groupwise(levels, scales, unpacked.float(), groups.long(), bits)


def _awq(parts: Parts, scheme: Scheme) -> Groupwise:
    """qweight: [in, out / 8]; qzeros: [groups, out / 8]; scales: [groups, out]."""
    place = torch.tensor(_AWQ_ORDER).argsort()
    levels, zeros = (
        unpacked.view(len(unpacked), -1, 8)[..., place].flatten(1).T
        for unpacked in (_unpacked(parts[name], 4, 1) for name in ("qweight", "qzeros"))
    )
    scales = parts["scales"].float().T
    groups = _groups(levels.shape[1], scales.shape[1], scheme.group_size)
    return Groupwise(levels, scales, zeros.float(), groups, 4)


def _compressed(parts: Parts, scheme: Scheme) -> StoredWeight:
    """weight_packed: [out, in / n] and weight_shape; or weight as int8 or float8: [out, in]."""
    scales = parts["weight_scale"]
    if "weight_packed" not in parts:
        weight = parts["weight"]
        if weight.is_floating_point():
            return BlockFloat8(weight, scales.reshape(*scales.shape, *[1] * (2 - scales.dim())))
        levels, bits = weight.view(torch.uint8) ^ 128, 8
    else:
        words, (_, num_inputs) = parts["weight_packed"], parts["weight_shape"].tolist()
        bits = next(b for b in (2, 4, 8) if words.shape[1] == -(-num_inputs * b // 32))
        levels = _unpacked(words, bits, 1)[:, :num_inputs]
    num_outputs, num_inputs = levels.shape
    scales = scales.float().reshape(-1, scales.shape[-1] if scales.dim() > 1 else 1)
    scales = scales.expand(num_outputs, -1)
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if (stored := parts.get("weight_zero_point")) is not None:
        if stored.dtype is torch.int32:
            zeros = _unpacked(stored, bits, 0)[:num_outputs].float()
        else:
            zeros = zeros + stored.float().reshape(-1, stored.shape[-1] if stored.dim() > 1 else 1)
    groups = parts.get("weight_g_idx")
    if groups is None or bool((groups < 0).any()):
        groups = _groups(num_inputs, scales.shape[1])
    return Groupwise(levels, scales, zeros, groups.long(), bits)


def _bitsandbytes(parts: Parts, scheme: Scheme) -> StoredWeight:
    """4 bits: the parts of a QuantState.  8 bits: weight int8 [out, in], SCB: [out]."""
    if "SCB" not in parts:
        stats = {n.removeprefix("weight."): t for n, t in parts.items() if n != "weight"}
        return Bnb4bit(parts["weight"], stats)
    levels = parts["weight"].view(torch.uint8) ^ 128
    scales = parts["SCB"].float()[:, None] / 127
    groups = torch.zeros(levels.shape[1], dtype=torch.long)
    return Groupwise(levels, scales, torch.full_like(scales, 128), groups, 8)
