"""Keys and values of all slots, in tensors made once and written in place.

Called by the static runner and by the layers it runs. Knows nothing of sequences: what lies past
the positions it is asked for is garbage, which nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

_MAX_INT8 = 127


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a language model keeps for each position."""

    num_layers: int
    num_heads: int  # of keys and values
    head_dim: int

    def position_bytes(self, dtype: torch.dtype, model_dtype: torch.dtype) -> int:
        """Bytes of one position in one slot. In int8, each head of a position has a scale."""
        scale = model_dtype.itemsize if dtype is torch.int8 else 0
        return 2 * self.num_layers * self.num_heads * (self.head_dim * dtype.itemsize + scale)


class Window(Protocol):
    """New positions start..stop-1 of one slot, and all up to `stop`, in every layer."""

    def put(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new positions; return keys and values of all: [1, heads, stop, head_dim] each.

        new: [2, heads, stop - start, head_dim], rotated keys and values.
        """


class Table(Protocol):
    """One new position in each of R slots, and the first `length` ones there, in every layer."""

    def put(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new positions; return keys and values: [R, heads, length, head_dim] each.

        new: [2, heads, R, head_dim], rotated keys and values.
        """


class KVCache:
    """[layers * 2, slots, heads, context, head_dim]: a layer's keys, then its values.

    The memory is taken as it is written: on a CPU, positions never reached cost nothing.
    """

    def __init__(
        self,
        shape: KVShape,
        num_slots: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        size = (2 * shape.num_layers, num_slots, shape.num_heads, context_length, shape.head_dim)
        self.data = torch.empty(size, dtype=dtype, device=device)

    def window(self, slot: int, start: int, stop: int) -> Window:
        """Where positions start..stop-1 of the slot go."""
        return _PlainWindow(self.data[:, slot], start, stop)

    def table(
        self, slots: torch.Tensor, positions: torch.Tensor, first: int | None, length: int
    ) -> Table:
        """Where one position of each slot goes: slots, positions: [R], on the cache's device.

        first: the slots are `first` and those behind it, in order; nothing is copied then to read
        them.  None: any slots, in any order.
        """
        return _PlainTable(self.data, slots, positions, first, length)

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Zeros in positions start..stop-1 of the slot."""
        self.data[:, slot, :, start:stop] = 0

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of slot `source` into slot `target`."""
        self.data[:, target, :, :length] = self.data[:, source, :, :length]


class QuantizedKVCache(KVCache):
    """As KVCache, each head of a position as 8-bit integers times a scale in the model's dtype."""

    def __init__(
        self,
        shape: KVShape,
        num_slots: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """dtype: the model's, in which keys and values come and go."""
        super().__init__(shape, num_slots, context_length, torch.int8, device)
        self._scales = torch.empty((*self.data.shape[:-1], 1), dtype=dtype, device=device)

    def window(self, slot: int, start: int, stop: int) -> Window:
        """See `KVCache.window`."""
        return _QuantizedWindow(self.data[:, slot], self._scales[:, slot], start, stop)

    def table(
        self, slots: torch.Tensor, positions: torch.Tensor, first: int | None, length: int
    ) -> Table:
        """See `KVCache.table`; what is read is copied in any case."""
        return _QuantizedTable(self.data, self._scales, slots, positions, first, length)

    def clear(self, slot: int, start: int, stop: int) -> None:
        """See `KVCache.clear`."""
        super().clear(slot, start, stop)
        self._scales[:, slot, :, start:stop] = 0

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See `KVCache.copy_prefix`."""
        super().copy_prefix(source, target, length)
        self._scales[:, target, :, :length] = self._scales[:, source, :, :length]


class _PlainWindow:
    """A few calls give the views of all layers, so that a step does not slice in each."""

    def __init__(self, data: torch.Tensor, start: int, stop: int) -> None:
        """data: [layers * 2, heads, context, head_dim]."""
        new = data[:, :, start:stop]
        self._new = new.view(-1, 2, *new.shape[1:]).unbind()
        self._keys = data[::2, None, :, :stop].unbind()
        self._values = data[1::2, None, :, :stop].unbind()

    def put(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Window.put`. Nothing is copied of what was there."""
        self._new[layer].copy_(new)
        return self._keys[layer], self._values[layer]


class _QuantizedWindow:
    """What was just written is read back too, so that a prompt in parts gives the same as whole."""

    def __init__(self, data: torch.Tensor, scales: torch.Tensor, start: int, stop: int) -> None:
        """data, scales: [layers * 2, heads, context, head_dim or 1]."""
        self._data = _PlainWindow(data, start, stop)
        self._scales = _PlainWindow(scales, start, stop)

    def put(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Window.put`."""
        data, scales = _quantized(new)
        keys, values = self._data.put(layer, data)
        key_scales, value_scales = self._scales.put(layer, scales)
        return keys * key_scales, values * value_scales


class _PlainTable:
    """All that changes between steps is in tensors, so that a step can be recorded once."""

    def __init__(
        self,
        data: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        first: int | None,
        length: int,
    ) -> None:
        """data: [layers * 2, slots, heads, context, head_dim]."""
        self._data, self._slots, self._positions = data, slots, positions
        self._first, self._length = first, length

    def put(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Table.put`."""
        both = self._data[2 * layer : 2 * layer + 2]
        both[:, self._slots, :, self._positions] = new.permute(2, 0, 1, 3)
        read = both[:, :, :, : self._length]
        if self._first is None:
            keys, values = read.index_select(1, self._slots).unbind()
        else:
            keys, values = read[:, self._first : self._first + len(self._slots)].unbind()
        return keys, values


class _QuantizedTable:
    def __init__(
        self,
        data: torch.Tensor,
        scales: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        first: int | None,
        length: int,
    ) -> None:
        self._data = _PlainTable(data, slots, positions, first, length)
        self._scales = _PlainTable(scales, slots, positions, first, length)

    def put(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Table.put`."""
        data, scales = _quantized(new)
        keys, values = self._data.put(layer, data)
        key_scales, value_scales = self._scales.put(layer, scales)
        return keys * key_scales, values * value_scales


def _quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] as int8, and the scale [..., 1] by which to multiply it; 0 stays 0."""
    scale = x.abs().amax(-1, keepdim=True) / _MAX_INT8
    scale = scale.clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).round_().clamp_(-_MAX_INT8, _MAX_INT8).to(torch.int8), scale
