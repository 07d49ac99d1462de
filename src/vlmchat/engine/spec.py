"""Every way in which model families differ, read from the checkpoint's config, never from a name.

The loader asks for it once; processor, runner and engine read it. Plain Python over config objects.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vlmchat.engine.llava import check_original, is_original
from vlmchat.engine.schemes import read_scheme
from vlmchat.errors import UnsupportedModel


class BothWays(StrEnum):
    """Where in a prompt a token also attends to those after it."""

    NOWHERE = "nowhere"
    PICTURES = "pictures"  # among the tokens of one picture
    PROMPT = "prompt"  # everywhere, so that each token's keys depend on the whole prompt


# One line of question and answer after the other; its pictures and <bos> come first of all.
# Source: PaliGemma's prompt format, <image>… <bos> text newline; the processor adds the last two.
PALIGEMMA_TEMPLATE = (
    "{%- for message in messages -%}{%- for part in message.content if part.type == 'image' -%}"
    "<image>{%- endfor -%}{%- endfor -%}{{- bos_token -}}"
    "{%- for message in messages -%}{%- for part in message.content if part.type == 'text' -%}"
    "{{- part.text + '\\n' -}}{%- endfor -%}{%- endfor -%}"
)


@dataclass(frozen=True, slots=True)
class Family:
    """What all checkpoints of one `model_type` have in common.

    crowds: a picture is processed in another way where a conversation holds several.
    chat_template: for families whose checkpoints have none of their own.
    """

    name: str
    both_ways: BothWays = BothWays.NOWHERE
    crowds: bool = False
    chat_template: str | None = None


# By config.model_type. A family belongs here once its tests pass.
FAMILIES = {
    "gemma3": Family("Gemma 3", BothWays.PICTURES),
    "idefics3": Family("Idefics3"),
    "internvl": Family("InternVL"),
    "llava": Family("LLaVA"),
    "llava_next": Family("LLaVA-NeXT"),
    "llava_onevision": Family("LLaVA-OneVision", crowds=True),
    "paligemma": Family("PaliGemma", BothWays.PROMPT, chat_template=PALIGEMMA_TEMPLATE),
    "qwen2_5_vl": Family("Qwen2.5-VL"),
    "qwen2_vl": Family("Qwen2-VL"),
    "qwen3_vl": Family("Qwen3-VL"),
    "smolvlm": Family("SmolVLM"),
}


# What transformers' `generate` would take from a generation config besides end tokens; 0, 1 and
# nothing at all leave an answer as it is.
_UNAPPLIED = (
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "num_beams",
    "stop_strings",
)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the engine must know of a model besides its weights.

    image_token: stands for a picture in a rendered prompt.  image_token_id: what the model takes
    a picture's features for; not always the same token.
    crowds: see Family.  grid_positions: a picture's tokens have rows and columns as positions.
    repetition_penalty: what the generation config says, 1 if nothing.  vocab_size: tokens.
    """

    family: str
    image_token: str
    image_token_id: int
    eos_token_ids: frozenset[int]
    context_length: int
    both_ways: BothWays = BothWays.NOWHERE
    crowds: bool = False
    grid_positions: bool = False
    chat_template: str | None = None
    repetition_penalty: float = 1.0
    vocab_size: int | None = None

    @property
    def reusable_prefix(self) -> bool:
        """Whether two prompts that begin alike have the same keys and values there."""
        return self.both_ways is not BothWays.PROMPT


def check_config(config: dict[str, Any], name: str) -> None:
    """Raise UnsupportedModel if a config.json is of a kind that is not served.

    For use before a large download.
    """
    read_scheme(config, name)  # refuses ways to store quantised weights
    if is_original(config):
        check_original(config, name)
    elif str(config.get("model_type")) not in FAMILIES:
        served = f"served are {', '.join(sorted(FAMILIES))}, and LLaVA's own layout"
        if any("ForCausalLM" in str(each) for each in config.get("architectures") or ()):
            raise UnsupportedModel(
                f"{name} is a text model ({config.get('model_type')}), which cannot see pictures; "
                "give a vision-language model, or this one as the --model-base of a LLaVA adapter"
            )
        raise UnsupportedModel(f"{name} is of type {config.get('model_type')!r}; {served}")


def read_spec(config: Any, generation_config: Any, processor: Any) -> ModelSpec:
    """The spec of a transformers config, its generation config and its processor.

    The end tokens are those of the generation config, which may name several.
    """
    text = config.get_text_config()
    family = FAMILIES[config.model_type]
    eos = _ids(generation_config.eos_token_id) or _ids(processor.tokenizer.eos_token_id)
    return ModelSpec(
        family=family.name,
        image_token=processor.image_token,
        image_token_id=config.image_token_id,
        eos_token_ids=frozenset(eos),
        context_length=text.max_position_embeddings,
        both_ways=family.both_ways,
        crowds=family.crowds,
        grid_positions="mrope_section" in (getattr(text, "rope_parameters", None) or {}),
        chat_template=None if processor.chat_template else family.chat_template,
        repetition_penalty=getattr(generation_config, "repetition_penalty", None) or 1.0,
        vocab_size=text.vocab_size,
    )


def unapplied(generation_config: Any) -> list[str]:
    """Settings of a generation config that change greedy answers too and are not applied here.

    `no_repeat_ngram_size 3`; those that only say how to sample are the caller's to choose.
    """
    found = ((name, getattr(generation_config, name, None)) for name in _UNAPPLIED)
    return [f"{name} {value}" for name, value in found if value and value != 1]


def _ids(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
