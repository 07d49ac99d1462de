"""The operators between products in C: each in one pass, where torch takes several.

Used by `lean.py` in place of `operators.py`, given by the static runner. See native/step.c.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlmchat.engine.native_library import NoNativeStep, native_library
from vlmchat.engine.operators import Operators

_VECTOR = 16  # numbers that the code takes at once
SILU = ("SiLU", "SiLUActivation")


class NativeOperators(Operators):
    """For bfloat16 on a CPU. Tensors have sizes that are multiples of 16 (heads of 32)."""

    def __init__(
        self,
        eps: float,
        activation: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
        sizes: tuple[int, ...],
    ) -> None:
        """sizes: of hidden states and of the MLP's inner ones, and half of a head's.

        Raises NoNativeStep with the reason.
        """
        super().__init__(eps, activation, dtype, device)
        if dtype is not torch.bfloat16 or device.type != "cpu":
            raise NoNativeStep("not in bfloat16 on a CPU")
        if type(activation).__name__ not in SILU:
            raise NoNativeStep(f"the activation is {type(activation).__name__}")
        if odd := [size for size in sizes if size % _VECTOR]:
            raise NoNativeStep(f"{odd[0]} is no multiple of {_VECTOR}")
        self._library, self._eps_number = native_library(), eps

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `Operators.normed`."""
        rows, hidden = x.shape
        to = x.new_empty(rows, hidden, dtype=torch.bfloat16)
        threads, addresses = torch.get_num_threads(), (x.data_ptr(), weight.data_ptr())
        self._library.vlmchat_norm(
            *addresses, rows, hidden, self._eps_number, to.data_ptr(), threads
        )
        return to

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """See `Operators.rotate_`. The heads of a row of x stand side by side."""
        rows, heads, dim = x.shape
        tables = cos.contiguous(), sin.contiguous()
        self._library.vlmchat_rotate(
            x.data_ptr(),
            *(rows, heads, x.stride(0), dim),
            *(table.data_ptr() for table in tables),
            torch.get_num_threads(),
        )

    def activated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Operators.activated`."""
        rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
        gate_up, to = gate_up.contiguous(), gate_up.new_empty(rows, inner)
        threads = torch.get_num_threads()
        self._library.vlmchat_activate(gate_up.data_ptr(), rows, inner, to.data_ptr(), threads)
        return to

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """See `Operators.add_`."""
        rows, hidden = x.shape
        y, threads = y.contiguous(), torch.get_num_threads()
        self._library.vlmchat_add(x.data_ptr(), y.data_ptr(), rows, hidden, threads)
