"""What stands between the products of a Llama-shaped layer, by torch, on any device and dtype.

Used by `lean.py`. `native_operators.py` has the same in C for where that is faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Operators:
    """Of one model. eps: of its norms.  activation: of its MLPs.  dtype: of its activations."""

    def __init__(
        self,
        eps: float,
        activation: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._activation, self._dtype = activation, dtype
        self._eps = torch.tensor(eps, device=device)

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of [T, hidden] float32 by [hidden] float32, in the model's dtype.

        F.rms_norm takes half as long again for one row, twice as long for a long prompt.
        """
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [T, 1]
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(weight).to(self._dtype)

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotary positions, in place: [T, heads, D] by [T, 1, D]; the sines' first half is negated.

        Source: rotate_half of transformers' Llama, which negates the half of x instead.
        """
        other = x.roll(x.shape[-1] // 2, -1)
        x.mul_(cos).addcmul_(other, sin)

    def activated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 * inner] of gates, then what they let through -> [T, inner]."""
        gate, up = gate_up.chunk(2, -1)
        return self._activation(gate).mul_(up)

    def add_(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """To [T, hidden] float32, in place, [T, hidden] in the model's dtype."""
        x += y
