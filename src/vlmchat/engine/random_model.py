"""A model of random weights in the shape of a known one, made on its device: nothing is read.

Called by the loader for `random:NAME`, and by the benchmarks to write such a checkpoint. It has the
demo model's tokenizer and prompt format, so that it can be asked as any other; what it says is
noise. Quantising, casting and moving are the loader's, as for weights that come from files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vlmchat.engine.assemble import Opened
from vlmchat.engine.hf_processor import read_processor
from vlmchat.engine.shapes import Shape
from vlmchat.engine.tensors import NamedTensor

# As transformers would initialise it.
_SPREAD = 0.02
# Random numbers are drawn once and used over and over; a prime, so that no two rows are alike.
_POOL = 4_194_301


def open_random(shape: Shape, demo: Path, device: torch.device) -> Opened:
    """demo: the directory whose tokenizer and prompt format are used."""
    config, processor = random_config(shape, demo)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    generation_config = GenerationConfig(eos_token_id=config.text_config.eos_token_id)
    return Opened(model, _tensors(model, device), processor, generation_config)


def random_config(shape: Shape, demo: Path) -> tuple[LlavaConfig, Any]:
    """The config of the whole model, and a processor for its pictures."""
    vision = CLIPVisionConfig(**shape.vision)
    processor = read_processor(demo, LlavaConfig(vision_config=vision))
    tokenizer, size = processor.tokenizer, vision.image_size
    processor.image_processor.size = {"height": size, "width": size}
    processor.image_processor.crop_size = {"height": size, "width": size}
    processor.patch_size = vision.patch_size
    text = LlamaConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=shape.text["vocab_size"] - 1,
        **shape.text,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(processor.image_token),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return config, processor


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
