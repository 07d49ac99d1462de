"""Tiny random checkpoints of the families that transformers serves, in their own formats.

Real config, model and processor classes; a byte-level tokenizer with the family's special tokens;
a chat template in the family's form. About a second each, no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.tiny import CORPUS, make_tiny_llava
from vlmchat.engine.hf_processor import pictures_only

CONTEXT_LENGTH = 1024
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.3,  # spreads the logits, so that greedy choices are no near-ties
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Idefics3 and SmolVLM: a blank after the colon unless a picture follows.
UTTERANCES = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message.role == 'assistant' else 'user' %}<start_of_turn>{{ role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>"
    "{% else %}{{ part.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: ',"
    " 'system': ''}[message.role] }}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def byte_tokenizer(specials: Sequence[str], *, bos: str = "", **named: str) -> Any:
    """A byte-level BPE tokenizer; `bos` goes in front of every text; `named` are special too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = ["<pad>", "</s>", *([bos] if bos else []), *specials]
    trainer = trainers.BpeTrainer(
        vocab_size=len(tokens) + 280,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "\n\n\n"], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos or None,
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": 1, "pad_token_id": 0}
    return {**TEXT, "vocab_size": len(tokenizer), **ids, **more}


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def _processor(kind: Any, *parts: Any, **settings: Any) -> Any:
    return pictures_only(kind)(*parts, **settings)


def _save(directory: Path, model: Any, processor: Any) -> Path:
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "language_model" not in name and "text_model" not in name:
            torch.nn.init.normal_(weight, std=0.2)  # so that pictures tell in the answer
    model.generation_config.eos_token_id = [1]
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def make_llava(directory: Path) -> Path:
    """LLaVA-1.5."""
    return make_tiny_llava(directory, context_length=CONTEXT_LENGTH)


def make_llava_next(directory: Path) -> Path:
    """LLaVA-NeXT: any-resolution tiles, a newline after each row."""
    tokenizer = byte_tokenizer(["<image>"], bos="<s>")
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=hf.LlamaConfig(**_text(tokenizer)),
        image_grid_pinpoints=pinpoints,
        image_token_index=_id(tokenizer, "<image>"),
        vision_feature_layer=-2,
    )
    processor = _processor(
        hf.LlavaNextProcessor,
        hf.LlavaNextImageProcessorPil(
            image_grid_pinpoints=pinpoints,
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return _save(directory, hf.LlavaNextForConditionalGeneration(config), processor)


def make_llava_onevision(directory: Path) -> Path:
    """LLaVA-OneVision: tiles for a picture alone, one tile each for several."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"])
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    vision = {**VISION, "vision_use_head": False}
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**vision),
        text_config=hf.Qwen2Config(**_text(tokenizer)),
        image_grid_pinpoints=pinpoints,
        image_token_index=_id(tokenizer, "<image>"),
        video_token_index=_id(tokenizer, "<video>"),
    )
    processor = _processor(
        hf.LlavaOnevisionProcessor,
        hf.LlavaOnevisionImageProcessorPil(
            image_grid_pinpoints=pinpoints, size={"height": 28, "width": 28}
        ),
        tokenizer,
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    return _save(directory, hf.LlavaOnevisionForConditionalGeneration(config), processor)


def _make_qwen(directory: Path, name: str, vision: dict[str, Any], text: dict[str, Any]) -> Path:
    specials = ["vision_start", "vision_end", "image_pad", "video_pad"]
    tokens = [f"<|{name}|>" for name in ("im_start", "im_end", *specials)]
    tokenizer = byte_tokenizer(tokens)
    ids = [_id(tokenizer, f"<|{special}|>") for special in specials]
    names = ["vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = getattr(hf, f"{name}Config")(
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 4, **vision},
        text_config={**_text(tokenizer), "rope_parameters": {**rope, **text}},
        **dict(zip(names, ids, strict=True)),
    )
    processor = _processor(
        getattr(hf, f"{name}Processor"),
        hf.Qwen2VLImageProcessorPil(
            patch_size=4,
            temporal_patch_size=2,
            merge_size=2,
            size={"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 24},
        ),
        tokenizer,
        None,
        chat_template=CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return _save(directory, getattr(hf, f"{name}ForConditionalGeneration")(config), processor)


def make_qwen2_vl(directory: Path) -> Path:
    """Qwen2-VL: pictures of any size, three-part positions."""
    vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return _make_qwen(directory, "Qwen2VL", vision, {})


def make_qwen2_5_vl(directory: Path) -> Path:
    """Qwen2.5-VL: as Qwen2-VL, with windows in the tower."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return _make_qwen(directory, "Qwen2_5_VL", vision, {})


def make_qwen3_vl(directory: Path) -> Path:
    """Qwen3-VL: features of the tower's inner layers go into the text model's first layers."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return _make_qwen(directory, "Qwen3VL", vision, {"mrope_interleaved": True})


def _make_idefics(directory: Path, name: str, video: Sequence[None]) -> Path:
    grid = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    tokenizer = byte_tokenizer(["<|im_start|>", *marks, *grid])
    config = getattr(hf, f"{name}Config")(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=_id(tokenizer, "<image>"),
        scale_factor=2,
    )
    processor = _processor(
        getattr(hf, f"{name}Processor"),
        getattr(hf, f"{name}ImageProcessorPil")(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        tokenizer,
        *video,
        image_seq_len=4,
        chat_template=UTTERANCES,
    )
    return _save(directory, getattr(hf, f"{name}ForConditionalGeneration")(config), processor)


def make_idefics3(directory: Path) -> Path:
    """Idefics3: tiles with row and column tokens between them."""
    return _make_idefics(directory, "Idefics3", [])


def make_smolvlm(directory: Path) -> Path:
    """SmolVLM: as Idefics3."""
    return _make_idefics(directory, "SmolVLM", [None])


def make_internvl(directory: Path) -> Path:
    """InternVL: tiles between a start and an end token."""
    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<|im_end|>"],
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = hf.InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    processor = _processor(
        hf.InternVLProcessor,
        hf.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=4),
        tokenizer,
        None,
        image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    return _save(directory, hf.InternVLForConditionalGeneration(config), processor)


def make_gemma3(directory: Path) -> Path:
    """Gemma-3: attends both ways inside a picture; sliding windows of 16 tokens."""
    tokenizer = byte_tokenizer(
        ["<start_of_turn>", "<end_of_turn>"],
        bos="<bos>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    layers = ["sliding_attention", "full_attention"]
    text = _text(tokenizer, head_dim=16, sliding_window=16, layer_types=layers)
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**{**VISION, "patch_size": 7}),
        text_config=hf.Gemma3TextConfig(**{**text, "query_pre_attn_scalar": 16}),
        mm_tokens_per_image=4,
        tie_word_embeddings=False,  # tied, a random model repeats its last token for ever
        boi_token_index=_id(tokenizer, "<start_of_image>"),
        eoi_token_index=_id(tokenizer, "<end_of_image>"),
        image_token_index=_id(tokenizer, "<image_soft_token>"),
    )
    processor = _processor(
        hf.Gemma3Processor,
        hf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer,
        image_seq_length=4,
        chat_template=TURNS,
    )
    return _save(directory, hf.Gemma3ForConditionalGeneration(config), processor)


def make_paligemma(directory: Path) -> Path:
    """PaliGemma: attends both ways over the whole prompt; has no chat template."""
    tokenizer = byte_tokenizer([], bos="<bos>", image_token="<image>")
    processor = _processor(
        hf.PaliGemmaProcessor,
        hf.SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_seq_length=4),
        tokenizer,
    )
    text = _text(tokenizer, head_dim=16)
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.GemmaConfig(**text),
        image_token_index=_id(tokenizer, "<image>"),
        projection_dim=64,
        vocab_size=len(tokenizer),
    )
    return _save(directory, hf.PaliGemmaForConditionalGeneration(config), processor)


MAKERS: dict[str, Callable[[Path], Path]] = {
    maker.__name__.removeprefix("make_"): maker
    for maker in (
        make_llava,
        make_llava_next,
        make_llava_onevision,
        make_qwen2_vl,
        make_qwen2_5_vl,
        make_qwen3_vl,
        make_idefics3,
        make_smolvlm,
        make_internvl,
        make_gemma3,
        make_paligemma,
    )
}


def make_family(name: str, directory: Path, seed: int = 0) -> Path:
    """The tiny checkpoint of a family, float32."""
    torch.manual_seed(seed)
    return MAKERS[name](directory)
