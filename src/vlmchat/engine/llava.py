"""LLaVA's own checkpoints: which configs are such, and which of them cannot be run.

Asked before a download and by the loader. The released checkpoints share `model_type: "llava"`
with the Hugging Face layout; what tells them apart are their `mm_*` keys. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmchat.errors import UnsupportedModel

# model_type -> the language model inside. The oldest checkpoints call themselves plain llama.
LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llama": "llama",
    "llava_mistral": "mistral",
    "mistral": "mistral",
}
_INSTEAD = "take --model-path liuhaotian/llava-v1.5-7b or another LLaVA on Llama or Mistral"


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of LLaVA's own making; one converted since may keep old keys."""
    if "text_config" in config and "vision_config" in config:
        return False
    return (
        "mm_vision_tower" in config
        or "mm_projector_type" in config
        or str(config.get("model_type")).startswith("llava_mpt")
        or any("LlavaLlama" in name or "LlavaMistral" in name for name in _classes(config))
    )


def language_model(config: Mapping[str, Any]) -> str:
    """`llama` or `mistral`; anything else that the config says is given as it stands."""
    if any("Mistral" in name for name in _classes(config)):
        return "mistral"
    kind = str(config.get("model_type"))
    return LANGUAGE_MODELS.get(kind, kind)


def check_original(config: Mapping[str, Any], name: str) -> None:
    """Raise UnsupportedModel, with what to do, for an original config that cannot be run."""
    kind = language_model(config)
    if "mpt" in kind or any("mpt" in each.lower() for each in _classes(config)):
        raise UnsupportedModel(f"{name} is LLaVA on MPT, which is not served; {_INSTEAD}")
    if kind not in LANGUAGE_MODELS.values():
        raise UnsupportedModel(f"{name} is LLaVA on {kind!r}, which is not served; {_INSTEAD}")
    if not isinstance(config.get("mm_vision_tower"), str):
        raise UnsupportedModel(
            f"{name} names no vision tower (mm_vision_tower in config.json), so it cannot see; "
            f"{_INSTEAD}"
        )
    if config.get("s2"):
        raise UnsupportedModel(
            f"{name} looks at pictures at several scales (s2 in config.json), which is not "
            f"served; {_INSTEAD}"
        )
    if config.get("mm_resampler_type"):
        raise UnsupportedModel(
            f"{name} has a resampler ({config['mm_resampler_type']}), which is not served; "
            f"{_INSTEAD}"
        )
    ratio = str(config.get("image_aspect_ratio"))
    if ratio.startswith("anyres") and ratio != "anyres":
        raise UnsupportedModel(
            f"{name} cuts pictures by {ratio!r}, which is not served; served are pad and anyres"
        )


def _classes(config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []
