"""Settings of a checkpoint in LLaVA's own layout, translated once: nobody else reads `mm_*` keys.

Called by the loader with the checkpoint's config.json and its vision tower's. No torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

from vlmchat.engine.hub import read_json
from vlmchat.engine.llava import language_model
from vlmchat.errors import CheckpointError, UnsupportedModel

_TEXT_KEYS = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
)
Size = tuple[int, int]  # width, height


@dataclass(frozen=True, slots=True)
class Pictures:
    """How pictures become features.

    aspect_ratio: "pad", "anyres", or "square" (resize and crop).
    resolutions: the canvases of anyres, (width, height).  merge: how its tiles are joined.
    layer: whose hidden states are features, 0 being what goes into the first one.
    keep_class: whether the class token is a feature.
    tile: side of what the tower takes, in pixels.  side: patches along it.
    projector: `linear`, `identity` or `mlpNx_gelu`; width: of its input.
    """

    aspect_ratio: str
    resolutions: tuple[Size, ...]
    merge: str
    layer: int
    keep_class: bool
    tile: int
    side: int
    projector: str
    width: int

    @property
    def newline(self) -> bool:
        """Whether the checkpoint holds a vector that ends a row of features."""
        return "unpad" in self.merge


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the config says of the tokenizer. marks: pictures stand between <im_start>, <im_end>."""

    patch: bool
    marks: bool

    @property
    def added(self) -> list[str]:
        """Tokens that are added to the tokenizer, in this order."""
        return ["<im_patch>"] * self.patch + ["<im_start>", "<im_end>"] * self.marks


def read_pictures(config: Mapping[str, Any], vision: CLIPVisionConfig, name: str) -> Pictures:
    """The picture settings of an original config.

    Raises CheckpointError, UnsupportedModel, and LookupError, ValueError, TypeError or SyntaxError
    where a setting is missing or makes no sense.
    """
    ratio = config.get("image_aspect_ratio")
    feature = config.get("mm_vision_select_feature", "patch")
    pictures = Pictures(
        aspect_ratio=ratio if ratio in ("pad", "anyres") else "square",
        resolutions=_resolutions(config.get("image_grid_pinpoints")),
        merge=str(config.get("mm_patch_merge_type") or "flat"),
        layer=range(vision.num_hidden_layers + 1)[int(config["mm_vision_select_layer"])],
        keep_class={"patch": False, "cls_patch": True}[feature],
        tile=vision.image_size,
        side=vision.image_size // vision.patch_size,
        projector=str(config.get("mm_projector_type") or "linear"),
        width=int(config.get("mm_hidden_size") or vision.hidden_size),
    )
    _check(pictures, name)
    return pictures


def read_tokens(config: Mapping[str, Any]) -> Tokens:
    """A missing `mm_use_im_patch_token` means yes."""
    return Tokens(
        patch=bool(config.get("mm_use_im_patch_token", True)),
        marks=bool(config.get("mm_use_im_start_end", False)),
    )


def read_vision(tower: Path) -> CLIPVisionConfig:
    """The vision part of a CLIP repository. Raises UnsupportedModel if it is no CLIP."""
    raw = read_json(tower / "config.json")
    if raw.get("model_type") not in ("clip", "clip_vision_model"):
        raise UnsupportedModel(
            f"the vision tower {tower} is of type {raw.get('model_type')!r}; LLaVA takes CLIP"
        )
    return CLIPVisionConfig.from_pretrained(tower, local_files_only=True)


def translate(
    config: Mapping[str, Any], vision: CLIPVisionConfig, pictures: Pictures, num_tokens: int
) -> LlavaConfig:
    """transformers' config for the same model, with `num_tokens` rows of embeddings.

    The image token is the number after the last row: no text can have it.
    """
    kind = MistralConfig if language_model(config) == "mistral" else LlamaConfig
    text = {key: config[key] for key in _TEXT_KEYS if key in config}
    pad = text.get("pad_token_id")
    if pad is None or not 0 <= pad < num_tokens:
        text["pad_token_id"] = None  # an embedding's padding row must exist
    if kind is MistralConfig:
        # The original runs Mistral by torch's attention, which then took no notice of a window.
        text["sliding_window"] = None
    return LlavaConfig(
        text_config=kind(**text, vocab_size=num_tokens),
        vision_config=vision,
        image_token_index=num_tokens,
        vision_feature_layer=pictures.layer,
        vision_feature_select_strategy="full" if pictures.keep_class else "default",
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _resolutions(value: Any) -> tuple[Size, ...]:
    """Some checkpoints hold the list as a text."""
    pairs = ast.literal_eval(value) if isinstance(value, str) else value or ()
    return tuple((int(width), int(height)) for width, height in pairs)


def _check(pictures: Pictures, name: str) -> None:
    if not re.fullmatch(r"linear|identity|mlp[1-9]\d*x_gelu", pictures.projector):
        raise UnsupportedModel(
            f"{name} has a projector of type {pictures.projector!r}; "
            "served are linear, identity and mlpNx_gelu"
        )
    if pictures.aspect_ratio != "anyres":
        return
    if pictures.merge not in ("flat", "spatial", "spatial_unpad"):
        raise UnsupportedModel(
            f"{name} joins tiles by {pictures.merge!r}; served are flat, spatial, spatial_unpad"
        )
    if pictures.keep_class and pictures.merge != "flat":
        raise UnsupportedModel(f"{name} keeps class tokens among tiles, which is not served")
    uneven = [size for size in pictures.resolutions if any(n % pictures.tile for n in size)]
    if uneven or not pictures.resolutions:
        raise CheckpointError(
            f"image_grid_pinpoints of {name} {f'holds {uneven[0]}' if uneven else 'is empty'}; "
            f"it must hold multiples of {pictures.tile}, the side of a tile"
        )
