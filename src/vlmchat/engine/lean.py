"""A Llama-shaped language model, its layers run by us over the weights of the loaded model.

Called by the static runner. Beside transformers' forward it builds no masks for decoding, joins
products of the same input, keeps keys and values where they are, and does each norm in one call.
Knows nothing of prompts and pictures: it takes embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from vlmchat.engine.fused import fuse
from vlmchat.engine.kv_cache import KVShape, Window


@dataclass(frozen=True, slots=True)
class Span:
    """Rows first..last-1 of a step's input, which belong to one slot.

    mask: [new, all] to add to the scores; None where the one new token sees all, or, with
    `causal`, where there is nothing before the new ones.
    """

    first: int
    last: int
    window: Window
    mask: torch.Tensor | None = None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights and products of one layer. `head_norm`: of queries and keys, one row a head."""

    attention_norm: torch.Tensor
    qkv: Callable[[torch.Tensor], torch.Tensor]
    head_norm: torch.Tensor | None
    output: Callable[[torch.Tensor], torch.Tensor]
    mlp_norm: torch.Tensor
    gate_up: Callable[[torch.Tensor], torch.Tensor]
    down: Callable[[torch.Tensor], torch.Tensor]


class LeanModel:
    """The layers and the final norm of transformers' Llama, Mistral, Qwen2 or Qwen3.

    Takes the place of the model's own layers: their weights become views of the joint ones.
    """

    def __init__(self, model: Any, context_length: int) -> None:
        """model: transformers' LlamaModel or one like it (see `static_runner.unsupported`)."""
        config, attention = model.config, model.layers[0].self_attn
        self._num_heads = config.num_attention_heads
        self._eps = config.rms_norm_eps
        self._scale = attention.scaling
        self._activation = model.layers[0].mlp.act_fn
        self.shape = KVShape(len(model.layers), config.num_key_value_heads, attention.head_dim)
        self._layers = [self._read(layer) for layer in model.layers]
        self._norm = model.norm.weight
        self._cos, self._sin = _rotation(model, context_length)

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [T, 1, head_dim] each, for positions [T]."""
        return self._cos[positions], self._sin[positions]

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        spans: Sequence[Span],
    ) -> torch.Tensor:
        """[T, hidden] -> [T, hidden], before the final norm. `x` is overwritten.

        The spans cover all rows, in order. Their keys and values are written.
        """
        for index, layer in enumerate(self._layers):
            normed = self._normed(x, layer.attention_norm)
            x += self._attention(index, layer, normed, rotation, spans)
            gate, up = layer.gate_up(self._normed(x, layer.mlp_norm)).chunk(2, dim=-1)
            x += layer.down(self._activation(gate).mul_(up))
        return x

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden], ready for the head."""
        return self._normed(x, self._norm)

    def _attention(
        self,
        index: int,
        layer: _Layer,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        spans: Sequence[Span],
    ) -> torch.Tensor:
        num_rotated = self._num_heads + self.shape.num_heads
        heads = layer.qkv(x).view(len(x), -1, self.shape.head_dim)  # [T, all heads, D]
        rotated, values = heads[:, :num_rotated], heads[:, num_rotated:]
        if layer.head_norm is not None:
            rotated = self._normed(rotated, None) * layer.head_norm
        rotated = rotate(rotated, *rotation)
        queries, keys = rotated[:, : self._num_heads], rotated[:, self._num_heads :]
        parts = []
        for span in spans:
            rows = slice(span.first, span.last)
            kept = span.window.put(index, keys[rows].transpose(0, 1), values[rows].transpose(0, 1))
            parts.append(attend(queries[rows], *kept, span, self._scale))
        return layer.output(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _normed(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self._eps)

    def _read(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        head_norm = None
        if hasattr(attention, "q_norm"):
            heads = (self._num_heads, self.shape.num_heads)
            norms = zip((attention.q_norm, attention.k_norm), heads, strict=True)
            head_norm = torch.cat([norm.weight.expand(count, -1) for norm, count in norms])
        return _Layer(
            attention_norm=layer.input_layernorm.weight,
            qkv=fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
            head_norm=head_norm,
            output=fuse([attention.o_proj]),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=fuse([mlp.gate_proj, mlp.up_proj]),
            down=fuse([mlp.down_proj]),
        )


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, span: Span, scale: float
) -> torch.Tensor:
    """[new, heads, D] over keys and values [kv heads, all, D] -> [new, heads * D].

    A group of query heads shares each head of keys and values.
    """
    num_new, num_heads, dim = queries.shape
    if num_new == 1:  # the group's queries stand as rows, so that its keys are read once
        rows = queries.view(1, len(keys), -1, dim)  # [1, kv heads, group, D]
        out = F.scaled_dot_product_attention(rows, keys[None], values[None], scale=scale)
        return out.reshape(1, num_heads * dim)
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=span.mask,
        is_causal=span.causal,
        scale=scale,
        enable_gqa=len(keys) != num_heads,
    )  # [1, heads, new, D]
    return out[0].transpose(0, 1).reshape(num_new, num_heads * dim)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: [T, heads, D] by [T, 1, D]; the sines' first half is negated already.

    Source: rotate_half of transformers' Llama, which negates the half of x instead.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _rotation(model: Any, context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [context, 1, D] by the model's own module."""
    like = model.embed_tokens.weight
    positions = torch.arange(context_length, device=like.device)[None]
    cos, sin = model.rotary_emb(like, positions)  # [1, context, D]
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return cos[0, :, None], sin[0, :, None]
