"""A step in C, over the weights of a LeanModel as torch has packed them.

Called by the static runner, which goes on with torch where this raises NoNativeStep. Beside torch
it reads weights at the rate of the memory, spends nothing between the products, and gives a row the
same result whatever the others are. Quantised weights are multiplied by inputs in 8 bits, a scale
for each group of them. Source: the layers are those of `lean.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from vlmchat.engine.kv_cache import KVCache
from vlmchat.engine.lean import LeanModel
from vlmchat.engine.native_library import NoNativeStep, native_library
from vlmchat.engine.native_operators import SILU
from vlmchat.engine.packed import TILE, Int4Linear, Int8Linear, PrepackedLinear

_KINDS = {PrepackedLinear: 0, Int8Linear: 1, Int4Linear: 2}
# Up to so many rows it is faster than torch: on CPUs with a matrix unit, and on others.
_MAX_ROWS = 1024
_MAX_ROWS_WITHOUT = {PrepackedLinear: 8, Int8Linear: 16, Int4Linear: 32}
_INT8_BLOCK = 16  # outputs, at least
_INT8_INPUTS = 64  # that share a scale
_WIDEST_BLOCK = 64
_ALIGNED = 64
_SIZES = ("num_layers", "hidden", "heads", "kv_heads", "dim", "num_slots", "context")
_BUFFERS = ("joint", "queries", "attended", "activated", "scratch")


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("out", "in", "kind", "block", "group")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "head_norm")),
        *((name, _Matrix) for name in ("qkv", "output", "gate_up", "down")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", ctypes.c_void_p),
        ("head", _Matrix),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("cache", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "slots", "positions", "logits")),
        *((name, ctypes.c_void_p) for name in _BUFFERS),
        ("scratch_size", ctypes.c_int64),
        ("first_logits", ctypes.c_int64),
    )


class NativeStep:
    """Steps of one model over one cache."""

    def __init__(self, lean: LeanModel, head: Any, cache: KVCache) -> None:
        """head: as `fuse` gives it.  Raises NoNativeStep where it is not for this model or CPU."""
        _check(lean, cache)
        self._library = native_library()
        self._held: list[Any] = []  # what the structures point to
        layers = (_Layer * len(lean.layers))()
        for place, layer in zip(layers, lean.layers, strict=True):
            place.attention_norm = self._address(layer.attention_norm)
            place.mlp_norm = self._address(layer.mlp_norm)
            if layer.head_norm is not None:
                place.head_norm = self._address(layer.head_norm)
            for name in ("qkv", "output", "gate_up", "down"):
                setattr(place, name, self._matrix(getattr(layer, name), whole=True))
        first: Any = lean.layers[0]
        if first.down.in_features % layers[0].gate_up.block:
            raise NoNativeStep("gate and up share a block")
        tiles = self._library.vlmchat_tiles(True)
        self.max_rows = _MAX_ROWS if tiles else _MAX_ROWS_WITHOUT[type(first.qkv)]
        self._widest = max(first.qkv.in_features, first.output.in_features, first.down.in_features)
        self._inner = first.down.in_features
        self._vocabulary: int = head.out_features
        shape = lean.shape
        self._model = _Model(
            layers=layers,
            norm=self._address(lean.norm),
            head=self._matrix(head),
            num_layers=len(layers),
            hidden=first.qkv.in_features,
            heads=lean.num_heads,
            kv_heads=shape.num_heads,
            dim=shape.head_dim,
            num_slots=cache.data.shape[1],
            context=cache.data.shape[3],
            cache=self._address(cache.data),
            eps=lean.eps,
            scale=lean.scale,
        )
        self._room = 0, 0  # rows and threads that the buffers are for
        self._buffers: list[torch.Tensor] = []

    def run(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        slots: Sequence[int],
        positions: Sequence[int],
        num_logits: int,
    ) -> torch.Tensor:
        """Logits [num_logits, vocabulary] of the last rows; keys and values of all are written.

        x: [rows, hidden], embeddings.  rotation: [rows, 1, head_dim] each.
        slots, positions: of each row; the rows of one slot stand in order.
        """
        rows, threads = len(slots), torch.get_num_threads()
        x = x.to(torch.float32, copy=True)
        cos, sin = (each.contiguous() for each in rotation)
        places = torch.tensor([slots, positions])
        logits = x.new_empty(num_logits, self._vocabulary, dtype=torch.bfloat16)
        if rows > self._room[0] or threads > self._room[1]:
            self._make_buffers(rows, threads)
        addresses = [each.data_ptr() for each in (x, cos, sin, *places, logits, *self._buffers)]
        step = _Step(rows, *addresses, self._buffers[-1].shape[1], rows - num_logits)
        model = ctypes.byref(self._model)
        self._library.vlmchat_step(model, ctypes.byref(step), threads)
        return logits

    def _make_buffers(self, rows: int, threads: int) -> None:
        """In the order of _BUFFERS; the last: [threads, bytes]."""
        m = self._model
        own = rows * m.hidden * 2 + 2 * rows * _WIDEST_BLOCK * 4
        # Inputs in 8 bits, a block of weights unpacked, or what attention takes (attention.h).
        scores = 96 * (m.context + 32) + 64 * m.dim + 5120
        own += max(_WIDEST_BLOCK * self._widest * 2, scores)
        self._room = rows, threads
        self._buffers = [
            torch.empty(rows, m.heads + 2 * m.kv_heads, m.dim),
            torch.empty(rows, m.heads, m.dim, dtype=torch.bfloat16),
            torch.empty(rows, m.heads, m.dim, dtype=torch.bfloat16),
            torch.empty(rows, self._inner, dtype=torch.bfloat16),
            torch.empty(threads, own + -own % _ALIGNED, dtype=torch.uint8),
        ]

    def _address(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, layer: Any, *, whole: bool = False) -> _Matrix:
        """whole: it must end with a block."""
        kind = _KINDS.get(type(layer))
        if kind is None:
            raise NoNativeStep(f"a layer is a {type(layer).__name__}")
        matrix = _Matrix(kind=kind, out=layer.out_features)
        setattr(matrix, "in", layer.in_features)
        if isinstance(layer, PrepackedLinear):
            self._held.append(layer)
            matrix.weight, matrix.block = layer.address, prepacked_block()
        else:
            int8 = isinstance(layer, Int8Linear)
            scales = layer.scales if int8 else layer.scales_zeros
            if scales.dtype is not torch.bfloat16 or not (int8 or layer.plain):
                raise NoNativeStep("a quantised layer is not as it comes from 16 bits")
            matrix.weight, matrix.scales = self._address(layer.weight), self._address(scales)
            matrix.block = _INT8_BLOCK if int8 and layer.out_features % TILE else TILE
            matrix.group = _INT8_INPUTS if int8 else layer.group
        if layer.bias is not None:
            if layer.out_features % matrix.block:
                raise NoNativeStep("a bias ends within a block")
            matrix.bias = self._address(layer.bias.to(torch.bfloat16))
        if layer.in_features % _INT8_INPUTS or (whole and layer.out_features % matrix.block):
            raise NoNativeStep(f"a layer is {layer.out_features} x {layer.in_features}")
        return matrix


def _check(lean: LeanModel, cache: KVCache) -> None:
    if cache.data.dtype is not torch.bfloat16 or cache.data.device.type != "cpu":
        raise NoNativeStep("not in bfloat16 on a CPU")
    if type(lean.activation).__name__ not in SILU:
        raise NoNativeStep(f"the activation is {type(lean.activation).__name__}")
    if lean.shape.head_dim % 32:
        raise NoNativeStep(f"a head has {lean.shape.head_dim} dimensions")


def prepacked_block() -> int:
    """How many outputs oneDNN puts together: [out / block, in / 2, block, 2].

    Raises NoNativeStep where it orders weights in another way.
    """
    num_outputs, num_inputs = 128, 64
    weight = (torch.arange(num_outputs * num_inputs) * 7 % 251).view(num_outputs, -1).bfloat16()
    layer = PrepackedLinear(weight)
    memory = (ctypes.c_uint8 * (2 * weight.numel())).from_address(layer.address)
    found = torch.frombuffer(memory, dtype=torch.bfloat16)
    for block in (32, 64):
        order = weight.view(-1, block, num_inputs // 2, 2).transpose(1, 2)
        if torch.equal(found, order.reshape(-1)):
            return block
    raise NoNativeStep("oneDNN orders weights in another way here")
