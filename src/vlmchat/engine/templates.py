"""LLaVA's conversation templates under their names, each as one Jinja text for transformers.

The loader asks for one when `--conv-mode` names it.
The formats are the table below; `templates/llava.jinja` renders them all. Knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlmchat.engine.hub import read_json
from vlmchat.engine.llava import language_model
from vlmchat.errors import ConfigError

# What stands for a picture in a rendered prompt.
IMAGE_MARKER = "<image>"


@dataclass(frozen=True, slots=True)
class ConversationTemplate:
    """A prompt format.

    jinja: takes transformers' `messages` and `add_generation_prompt`; a picture becomes `<image>`.
    stop: text that ends an answer, beside the tokenizer's end token.
    """

    name: str
    jinja: str
    stop: tuple[str, ...]


_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER = _HUMAN.replace("human", "user")
_SEES = (
    "able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language."
)
# LLaVA's own bytes: no blank between the last two sentences.
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    f"The assistant is {_SEES}"
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = f"You are a helpful language and vision assistant. You are {_SEES}"
_MPT = (
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)


def _side(cue: str, before: str, after: str) -> dict[str, str]:
    """How one speaker's part looks: `cue` when nothing is said, else before + text + after."""
    return {"cue": cue, "before": before, "after": after}


# A style is how a prompt looks: opening, system text in its wrap (if any), closing, then the
# speakers' parts. `first` is the first user message's part, where it differs.
_SINGLE = {
    "closing": "###",
    "user": _side("Human:", "Human: ", "###"),
    "assistant": _side("Assistant:", "Assistant: ", "###"),
}
_TWO = {
    "closing": " ",
    "user": _side("USER:", "USER: ", " "),
    "assistant": _side("ASSISTANT:", "ASSISTANT: ", "</s>"),
}
_CHATML = {
    "opening": "<|im_start|>system\n",
    "closing": "<|im_end|>",
    "user": _side("<|im_start|>user\n", "<|im_start|>user\n", "<|im_end|>"),
    "assistant": _side("<|im_start|>assistant\n", "<|im_start|>assistant\n", "<|im_end|>"),
}
_INST = {
    "opening": "[INST] ",
    "wrap": ["<<SYS>>\n", "\n<</SYS>>\n\n"],
    "first": _side("", "", " [/INST]"),
    "user": _side("", "[INST] ", " [/INST]"),
    "assistant": _side("", " ", " </s>"),
}
_PLAIN = {"user": _side("", "", "\n"), "assistant": _side("", "", "\n")}

_LLAVA_V1 = {**_TWO, "system": _HUMAN}
_VICUNA_V1 = {**_TWO, "system": _USER}
_CHATML_DIRECT = {**_CHATML, "system": "Answer the questions."}
_FORMS: Mapping[str, Mapping[str, Any]] = {
    "v1": _VICUNA_V1,
    "vicuna_v1": _VICUNA_V1,
    "llava_v0": {**_SINGLE, "system": _HUMAN},
    "llava_v1": _LLAVA_V1,
    "v0_mmtag": {**_SINGLE, "system": _MMTAG, "tagged": True},
    "v1_mmtag": {**_TWO, "system": _MMTAG, "tagged": True},
    "llava_llama_2": {**_INST, "system": _LLAMA_2, "user": _side("", "<s>[INST] ", " [/INST]")},
    "mistral_instruct": _INST,
    "mistral_direct": _CHATML_DIRECT,
    "chatml_direct": _CHATML_DIRECT,
    "mpt": {**_CHATML, "system": _MPT},
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
}
_STOPS = ("###", "<|im_end|>")  # the other formats end an answer by the tokenizer's end token
TEMPLATE_NAMES = tuple(_FORMS)

# Names of LLaVA whose formats hold long texts of other projects -> the nearest one here.
_LEFT_OUT = {"default": "llava_v0", "v0": "llava_v0", "llama_2": "llava_llama_2"}

# Source: LLaVA's command line; the first part found in the lower-cased name wins.
_NAME_PARTS = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
    ("", "llava_v0"),
)

# What a Llama with LLaVA-1.5's projector may have been trained with besides `llava_v1`.
_ONLY_NAMED = ("llava_llama_2", "chatml_direct")

_TOKENIZER_SIGNS = (
    ("<|im_start|>", "chatml_direct"),
    ("<<SYS>>", "llava_llama_2"),
    ("[INST]", "mistral_instruct"),
)


def template(name: str) -> ConversationTemplate:
    """The template of that name; ConfigError, with the names there are, if there is none."""
    if name in _LEFT_OUT:
        raise ConfigError(
            f"--conv-mode {name} is not carried: it holds a long text of another project; "
            f"the nearest is {_LEFT_OUT[name]}, with --system for another system prompt"
        )
    if name not in _FORMS:
        close = get_close_matches(name, TEMPLATE_NAMES, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(
            f"--conv-mode {name} is not known; {hint}known are {', '.join(TEMPLATE_NAMES)}"
        )
    return _build(name, _FORMS[name])


def _build(name: str, format_: Mapping[str, Any]) -> ConversationTemplate:
    form = {"system": "", "opening": "", "wrap": ["", ""], "closing": "", **format_}
    form.setdefault("first", form["user"])
    body = files("vlmchat.engine").joinpath("templates/llava.jinja").read_text("utf-8")
    # JSON is a Jinja literal too.
    jinja = f"{{%- set form = {json.dumps(form)} -%}}\n{body}"
    after = form["assistant"]["after"]
    return ConversationTemplate(name, jinja, (after,) if after in _STOPS else ())


def template_for_checkpoint(
    directory: Path, config: Mapping[str, Any], name: str
) -> tuple[str, str]:
    """The name of LLaVA's template for a checkpoint in LLaVA's own layout, and the rule why.

    directory: of its tokenizer, which may be its base's. By its config and its tokenizer's where
    these can tell; by its name as the last resort.
    """
    if language_model(config) == "mistral":
        return "mistral_instruct", "the Mistral language model in config.json"
    settings = read_json(directory / "tokenizer_config.json")
    chat = json.dumps([settings.get("chat_template"), settings.get("added_tokens_decoder")])
    for sign, found in _TOKENIZER_SIGNS:
        if sign in chat:
            return found, f"{sign} in tokenizer_config.json"
    found, rule = template_for_model(name)
    if found not in _ONLY_NAMED and "gelu" in str(config.get("mm_projector_type")):
        return "llava_v1", "the projector of LLaVA-1.5 in config.json"
    return found, rule


def template_for_model(model: str) -> tuple[str, str]:
    """The name of LLaVA's template for a checkpoint of this path or hub id, and the rule why.

    The last resort: a name says little. For a `checkpoint-N` folder its parent's name counts too.
    """
    *parents, name = model.strip("/").split("/")
    if parents and name.startswith("checkpoint-"):
        name = f"{parents[-1]}_{name}"
    part, found = next(pair for pair in _NAME_PARTS if pair[0] in name.lower())
    rule = f"{part!r} in the name" if part else "nothing in the name that says otherwise"
    return found, rule
