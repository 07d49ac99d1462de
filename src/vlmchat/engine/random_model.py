"""A model of random weights in the shape of a known one, made on its device: nothing is read.

Called by the loader for `random:NAME`, and by the benchmarks to write such a checkpoint. Its words
are numbers, each of them one token, so that what it draws can be asked on as it was drawn; what it
says is noise. Quantising, casting and moving are the loader's, as for weights from files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmchat.engine.assemble import Opened
from vlmchat.engine.hf_processor import pictures_only
from vlmchat.engine.shapes import Shape
from vlmchat.engine.spare import on_meta
from vlmchat.engine.tensors import NamedTensor

# As transformers would initialise it.
_SPREAD = 0.02
# Random numbers are drawn once and used over and over; a prime, so that no two rows are alike.
_POOL = 4_194_301
_SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
_WORDS = (*_SPECIAL, "USER:", "ASSISTANT:")
# A content is a text, or a list of pictures and texts.
_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(message.role, '') }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{{ '</s>' if message.role == 'assistant' else ' ' }}"
    "{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"
)


def open_random(shape: Shape, device: torch.device) -> Opened:
    """The model with its weights yet to be made."""
    config = random_config(shape)
    with on_meta():
        model = LlavaForConditionalGeneration(config)
    generation_config = GenerationConfig(eos_token_id=config.text_config.eos_token_id)
    return Opened(model, _tensors(model, device), random_processor(shape), generation_config)


def random_config(shape: Shape) -> LlavaConfig:
    """The config of the whole model."""
    text = LlamaConfig(
        pad_token_id=_WORDS.index("<pad>"),
        bos_token_id=_WORDS.index("<s>"),
        eos_token_id=shape.text["vocab_size"] - 1,
        **shape.text,
    )
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**shape.vision),
        text_config=text,
        image_token_index=_WORDS.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def random_processor(shape: Shape) -> Any:
    """Takes pictures of the shape's size, and a word for each token of its vocabulary."""
    words = (*_WORDS, *map(str, range(shape.text["vocab_size"] - len(_WORDS))))
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        pad_token="<pad>",
        unk_token="<unk>",
    )
    size = {"height": shape.vision["image_size"], "width": shape.vision["image_size"]}
    return pictures_only(LlavaProcessor)(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=fast,
        patch_size=shape.vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def _tensors(model: Any, device: torch.device) -> Iterator[NamedTensor]:
    """Every tensor of the model, on the device: ones for norms, zeros for biases, else noise."""
    generator = torch.Generator(device).manual_seed(0)
    pool = torch.empty(_POOL, device=device, dtype=torch.bfloat16)
    pool.normal_(0.0, _SPREAD, generator=generator)
    for name, like in model.state_dict().items():
        if like.ndim > 1 or not name.endswith(("weight", "bias")):
            repeats = -(-like.numel() // _POOL)
            yield name, pool.repeat(repeats)[: like.numel()].view(like.shape)
        else:
            fill = 1.0 if name.endswith("weight") else 0.0
            yield name, torch.full(like.shape, fill, device=device)
