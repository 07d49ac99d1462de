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

from vlmchat.engine.fused import Room, fuse
from vlmchat.engine.kv_cache import KVShape, Table, Window
from vlmchat.engine.operators import Operators


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
class Abreast:
    """All rows of a step's input as the one new token of a slot each; they attend at once.

    mask: [rows, 1, 1, length], True where a row sees. What it does not see must be finite.
    """

    table: Table
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Added:
    """What is added to rows of a step's input after each of the first layers (Qwen3-VL).

    rows: [n].  features: [n, hidden] for each such layer.
    """

    rows: torch.Tensor
    features: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights and products of one layer. `head_norm`: of queries and keys, one row a head."""

    attention_norm: torch.Tensor
    qkv: Callable[[torch.Tensor], torch.Tensor]
    head_norm: torch.Tensor | None
    output: Callable[[torch.Tensor], torch.Tensor]
    mlp_norm: torch.Tensor
    gate_up: Callable[[torch.Tensor], torch.Tensor]
    down: Callable[[torch.Tensor], torch.Tensor]


class LeanModel:
    """The layers and the final norm of transformers' Llama, Mistral, Qwen2, Qwen3 or its VL kin.

    Takes the place of the model's own layers: their weights become views of the joint ones.
    """

    def __init__(self, model: Any, context_length: int, operators: Operators | None = None) -> None:
        """model: transformers' LlamaModel or one like it (see `static_runner.unsupported`).

        operators: between products; None: torch's.
        """
        config, attention = model.config, model.layers[0].self_attn
        self.num_heads = config.num_attention_heads
        self.eps = config.rms_norm_eps
        self._dtype, device = model.embed_tokens.weight.dtype, model.embed_tokens.weight.device
        self.scale = attention.scaling
        self.activation = model.layers[0].mlp.act_fn
        self.shape = KVShape(len(model.layers), config.num_key_value_heads, attention.head_dim)
        room = Room()
        self.layers = [self._read(layer, room) for layer in model.layers]
        self.norm = model.norm.weight.float()
        plain = Operators(self.eps, self.activation, self._dtype, device)
        self._operators = operators or plain
        self._rotary = model.rotary_emb
        positions = torch.arange(context_length, device=device)[None]
        self._cos, self._sin = _rotation(self._rotary, positions, model.embed_tokens.weight)

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [T, 1, head_dim] each, for positions [T]."""
        return self._cos[positions], self._sin[positions]

    def grid_rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for positions [3, T] of time, row and column (M-RoPE)."""
        return _rotation(self._rotary, positions[:, None], self.norm.to(self._dtype))

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        spans: Sequence[Span] | Abreast,
        added: Sequence[Added] = (),
        only_last: bool = False,
    ) -> torch.Tensor:
        """[T, hidden] -> [T, hidden] in float32, before the final norm.

        only_last: of the one span, only the last row is wanted; the last layer computes all keys
        and values, but may leave out the rest for other rows, and the result is then [1, hidden].

        The spans cover all rows, in order. Their keys and values are written. What goes from layer
        to layer is kept in float32, which spares the norms a conversion.
        """
        x = x.float()
        for index, layer in enumerate(self.layers):
            heads = layer.qkv(self._operators.normed(x, layer.attention_norm))
            here = [each for each in added if index < len(each.features)]
            ends = only_last and index == len(self.layers) - 1 and not here
            attended = self._attended(index, layer, heads, rotation, spans, ends)
            x = x[-1:] if ends else x
            self._operators.add_(x, layer.output(attended))
            inner = layer.gate_up(self._operators.normed(x, layer.mlp_norm))
            self._operators.add_(x, layer.down(self._operators.activated(inner)))
            for each in here:
                x.index_add_(0, each.rows, each.features[index].to(x))
        return x

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] float32 -> [T, hidden], ready for the head."""
        return self._operators.normed(x, self.norm)

    def _attended(
        self,
        index: int,
        layer: Layer,
        heads: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        spans: Sequence[Span] | Abreast,
        ends: bool,
    ) -> torch.Tensor:
        """[T, all heads * D] of queries, keys and values -> [T, query heads * D].

        ends: the last row's alone.
        """
        num_queries, num_kept, dim = self.num_heads, self.shape.num_heads, self.shape.head_dim
        heads = heads.view(-1, num_queries + 2 * num_kept, dim)
        rotated = heads[:, : num_queries + num_kept]
        if layer.head_norm is not None:
            normed = F.rms_norm(rotated, (dim,), None, self.eps)
            torch.mul(normed, layer.head_norm, out=rotated)
        self._operators.rotate_(rotated, *rotation)
        queries = heads[-1 if ends else 0 :, :num_queries]
        new = heads[:, num_queries:].view(-1, 2, num_kept, dim).permute(1, 2, 0, 3)
        if isinstance(spans, Abreast):
            kept = spans.table.put(index, new)
            return attend_abreast(queries, *kept, spans.mask, self.scale)
        if len(spans) == 1:
            return attend(queries, *spans[0].window.put(index, new), spans[0], self.scale)
        parts = []
        for span in spans:
            kept = span.window.put(index, new[:, :, span.first : span.last])
            parts.append(attend(queries[span.first : span.last], *kept, span, self.scale))
        return torch.cat(parts)

    def _read(self, layer: Any, room: Room) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        head_norm = None
        if hasattr(attention, "q_norm"):
            heads = (self.num_heads, self.shape.num_heads)
            norms = zip((attention.q_norm, attention.k_norm), heads, strict=True)
            head_norm = torch.cat([norm.weight.expand(count, -1) for norm, count in norms])
        return Layer(
            attention_norm=layer.input_layernorm.weight.float(),
            qkv=fuse([attention.q_proj, attention.k_proj, attention.v_proj], room),
            head_norm=head_norm,
            output=fuse([attention.o_proj]),
            mlp_norm=layer.post_attention_layernorm.weight.float(),
            gate_up=fuse([mlp.gate_proj, mlp.up_proj], room),
            down=fuse([mlp.down_proj]),
        )


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, span: Span, scale: float
) -> torch.Tensor:
    """[new, heads, D] over keys and values [1, kv heads, all, D] -> [new, heads * D].

    A group of query heads shares each head of keys and values.
    """
    num_new, num_heads, dim = queries.shape
    num_kept = keys.shape[1]
    if num_new == 1:  # the group's queries stand as rows, so that its keys are read once
        rows = queries.view(1, num_kept, -1, dim)  # [1, kv heads, group, D]
        out = F.scaled_dot_product_attention(rows, keys, values, scale=scale)
        return out.reshape(1, num_heads * dim)
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=span.mask,
        is_causal=span.causal,
        scale=scale,
        enable_gqa=num_kept != num_heads,
    )  # [1, heads, new, D]
    return out[0].transpose(0, 1).reshape(num_new, num_heads * dim)


def attend_abreast(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[rows, heads, D] over keys and values [rows, kv heads, length, D] -> [rows, heads * D].

    mask: [rows, 1, 1, length]. As in `attend`, a group's queries stand as rows.
    """
    num_rows, num_heads, dim = queries.shape
    num_kept = keys.shape[1]
    rows = queries.reshape(num_rows, num_kept, -1, dim)  # [rows, kv heads, group, D]
    mask = mask.expand(-1, num_kept, rows.shape[2], -1)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(num_rows, num_heads * dim)


def _rotation(
    rotary: Any, positions: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T, 1, D] in the dtype of `like`, by the model's own module.

    positions: [1, T] or [3, 1, T], as the module takes them.
    """
    cos, sin = rotary(like, positions)  # [1, T, D]
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return cos[0, :, None], sin[0, :, None]
