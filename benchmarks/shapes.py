"""Random checkpoints in real shapes, for speed only: what they say is noise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vlmchat.config import DEMO_MODEL
from vlmchat.engine.hub import find_checkpoint

# LLaVA-1.5 in small: 576 tokens a picture, 294 M parameters.
SMALL: dict[str, Any] = {
    "vision": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "text": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 4096,
        "vocab_size": 32064,
    },
}


def make_checkpoint(directory: Path, dtype: str = "bfloat16") -> Path:
    """Write a random LLaVA of shape SMALL with the demo's tokenizer; once, then reuse it."""
    import torch
    from transformers import (
        AutoProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    if (directory / "model.safetensors").exists():
        return directory
    processor = AutoProcessor.from_pretrained(find_checkpoint(DEMO_MODEL, None, lambda stage: None))
    processor.image_processor.size = {"height": 336, "width": 336}
    processor.patch_size = 14
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=336, patch_size=14, intermediate_size=1536, **SMALL["vision"]
        ),
        text_config=LlamaConfig(
            bos_token_id=processor.tokenizer.bos_token_id,
            eos_token_id=SMALL["text"]["vocab_size"] - 1,  # never drawn: answers run their length
            **SMALL["text"],
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids(processor.image_token),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(getattr(torch, dtype))
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
