"""Shapes of well-known models, for random weights: speed depends on sizes, not on what is said.

Read by `random_model`, by the bench's options and by the benchmarks. Plain data, no torch. Each is
a LLaVA: a CLIP tower, two linear layers, a Llama. Source: the models' own config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmchat.errors import ConfigError

# How a random model is called where a path is wanted: `random:llava-1.5-7b`.
PREFIX = "random:"


@dataclass(frozen=True, slots=True)
class Shape:
    """Settings of transformers' CLIPVisionConfig and LlamaConfig that differ from their defaults.

    The end token is the last of the vocabulary, which no text has.
    """

    vision: Mapping[str, Any]
    text: Mapping[str, Any]


def _vision(hidden: int, layers: int, heads: int, mlp: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    picture = {"image_size": 336, "patch_size": 14}
    return {**sizes, "intermediate_size": mlp, "projection_dim": hidden, **picture, **more}


def _text(hidden: int, layers: int, heads: int, mlp: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    whole = {"num_key_value_heads": heads, "max_position_embeddings": 4096, "vocab_size": 32064}
    return {**sizes, "intermediate_size": mlp, **whole, **more}


SHAPES: Mapping[str, Shape] = {
    # For tests: 4 tokens a picture.
    "tiny": Shape(
        _vision(32, 2, 2, 64, image_size=28),
        _text(64, 2, 4, 96, max_position_embeddings=1024, vocab_size=1100),
    ),
    # LLaVA-1.5 in small: 576 tokens a picture, 294 M parameters.
    "small": Shape(_vision(384, 12, 6, 1536), _text(1024, 16, 16, 2816)),
    "llava-1.5-7b": Shape(_vision(1024, 24, 16, 4096), _text(4096, 32, 32, 11008)),
    "llava-1.5-13b": Shape(_vision(1024, 24, 16, 4096), _text(5120, 40, 40, 13824)),
}


def find_shape(path: str) -> Shape | None:
    """The shape that `random:NAME` names; None for every other path. Raises ConfigError."""
    if not path.startswith(PREFIX):
        return None
    name = path.removeprefix(PREFIX)
    if name not in SHAPES:
        raise ConfigError(f"no shape is called {name!r}; there are {', '.join(SHAPES)}")
    return SHAPES[name]
