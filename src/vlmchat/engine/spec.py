"""Every way in which model families differ, read from the checkpoint's config, never from a name.

The loader asks for it once; processor, runner and engine read it. Plain Python over config objects.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vlmchat.errors import UnsupportedModel

# config.model_type -> what people call it. A family belongs here once its tests pass.
FAMILIES = {"llava": "LLaVA", "llava_next": "LLaVA-NeXT"}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the engine must know of a model besides its weights."""

    family: str
    image_token: str
    image_token_id: int
    eos_token_ids: frozenset[int]
    context_length: int


def check_config(config: dict[str, Any], name: str) -> None:
    """Raise UnsupportedModel if a config.json is of a kind that is not served.

    For use before a large download. The released LLaVA checkpoints share `model_type: "llava"`
    with the Hugging Face layout but carry their settings as `mm_*` keys at the top.
    """
    if "mm_vision_tower" in config:
        raise UnsupportedModel(
            f"{name} is in the original LLaVA layout, which is not served yet; take the same model "
            "in the Hugging Face layout, for example --model-path llava-hf/llava-1.5-7b-hf"
        )
    if config.get("model_type") not in FAMILIES:
        raise UnsupportedModel(
            f"{name} is of type {config.get('model_type')!r}; "
            f"served are {', '.join(sorted(FAMILIES))}"
        )


def read_spec(config: Any, generation_config: Any, processor: Any) -> ModelSpec:
    """The spec of a transformers config, its generation config and its processor."""
    text = config.get_text_config()
    eos = _ids(generation_config.eos_token_id) or _ids(processor.tokenizer.eos_token_id)
    return ModelSpec(
        family=FAMILIES[config.model_type],
        image_token=processor.image_token,
        image_token_id=config.image_token_id,
        eos_token_ids=frozenset(eos),
        context_length=text.max_position_embeddings,
    )


def _ids(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
