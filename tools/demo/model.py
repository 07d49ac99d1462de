"""The architecture of the demo model, its processor and the heads used only in training."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tools.demo.pool import GRID, PATCH, SIDE
from tools.demo.scenes import COLORS, KINDS, REGIONS, SIZES

PATCHES = GRID * GRID
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE)
VOCAB_SIZE = 1024
TOWER_WIDTH = 128
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(message['role'], '') -}}
{%- if message['content'] is string -%}
{{- message['content'] | trim -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] | trim -}}{{- '' if loop.last else ' ' -}}
{%- endfor -%}
{%- endif -%}
{{- eos_token if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt %}ASSISTANT:{% endif -%}
"""


def build_config() -> LlavaConfig:
    """About 3.8 million parameters."""
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=4 * TOWER_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=TOWER_WIDTH,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        dtype="float32",
    )


def build_model() -> LlavaForConditionalGeneration:
    """A model with fresh weights."""
    model = LlavaForConditionalGeneration(build_config())
    generation = model.generation_config
    generation.pad_token_id = SPECIAL_TOKENS.index(PAD)
    generation.bos_token_id = SPECIAL_TOKENS.index(BOS)
    generation.eos_token_id = SPECIAL_TOKENS.index(EOS)
    return model


def build_processor(tokenizer: Tokenizer) -> LlavaProcessor:
    """Tokenizer, picture preparation and chat template in one."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        do_center_crop=False,
        default_to_square=True,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def normalised(pixels: Tensor) -> Tensor:
    """uint8 pictures [n, side, side, 3] as the tower wants them."""
    values = pixels.permute(0, 3, 1, 2).float() / 255
    return (values - MEAN[0]) / STD[0]


class PatchHeads(nn.Module):
    """Linear read-outs on the tower's patches that say what covers each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = (len(KINDS) + 1, len(COLORS), len(SIZES), len(REGIONS), 1)
        self.out = nn.Linear(TOWER_WIDTH, sum(self.widths))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits for shape (0: none), colour, size, region and being the shape's middle."""
        return self.out(features).split(self.widths, dim=-1)  # type: ignore[no-any-return]


def patch_loss(logits: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """How wrong the read-outs are; `labels` is [n, patches, 5], see `patch_targets`."""
    kind, color, size, region, anchor = logits
    covered = labels[..., 0] > 0
    loss = nn.functional.cross_entropy(kind.flatten(0, 1), labels[..., 0].flatten())
    for guess, column in ((kind[..., 1:], 0), (color, 1), (size, 2), (region, 3)):
        target = labels[..., column][covered] - (1 if column == 0 else 0)
        loss = loss + nn.functional.cross_entropy(guess[covered], target)
    weight = torch.tensor(8.0)
    middle = nn.functional.binary_cross_entropy_with_logits(
        anchor.squeeze(-1), labels[..., 4].float(), pos_weight=weight
    )
    return loss + middle


def load(folder: Path) -> LlavaForConditionalGeneration:
    """A saved model in float32."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlavaForConditionalGeneration)
    return model
