"""A random checkpoint on disk in the shape of LLaVA-1.5 in small, for those who read files only."""

from __future__ import annotations

import shutil
from pathlib import Path


def make_checkpoint(directory: Path, dtype: str = "bfloat16", name: str = "small") -> Path:
    """Write a random LLaVA in one of the engine's shapes; once, then reuse it."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlavaForConditionalGeneration

    from vlmchat.engine.random_model import random_config, random_processor
    from vlmchat.engine.shapes import SHAPES

    if (directory / "model.safetensors").exists():
        return directory
    torch.manual_seed(0)
    shape = SHAPES[name]
    model = LlavaForConditionalGeneration(random_config(shape)).to(getattr(torch, dtype))
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    # Under the names that LLaVA's checkpoints on the hub have: every reader knows these.
    file = directory / "model.safetensors"
    names = "vision_tower.", "vision_tower.vision_model."
    tensors = {name.replace(*names): value for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    processor = random_processor(shape)
    processor.save_pretrained(directory)
    return directory
