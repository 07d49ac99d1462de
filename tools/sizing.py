"""Write the sizing tables of docs/deploy.md: `python -m tools.sizing`.

What a model needs of a card, by the arithmetic that the program itself goes by when it loads one:
weights as `engine/memory.py` counts them, keys and values as `engine/kv_cache.py` keeps them, slots
as `engine/capacity.py` fits them. Models are built on the meta device, from sizes: nothing is read.
A test compares the page with what this would write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from vlmchat.config import EngineConfig
from vlmchat.engine.capacity import fit, shape_of
from vlmchat.engine.random_model import random_config
from vlmchat.engine.shapes import SHAPES
from vlmchat.engine.spare import on_meta
from vlmchat.engine.weights import HEADROOM, is_linear, needed_bytes
from vlmchat.errors import OutOfMemory

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
BEGIN, END = "<!-- Made by `python -m tools.sizing`; do not edit. -->", "<!-- Made until here. -->"
CONTEXT = 4096  # tokens of a slot
BEFORE = 1000  # tokens before the one that is decoded
# As they are quantised on a GPU: none, bitsandbytes' 8 bits, its 4 bits.
KINDS = (None, "bnb-int8", "bnb-nf4")
# GB, and GB/s by the makers' data sheets (the H100 is the SXM5, the A100 the SXM4 of 80 GB).
CARDS = {
    "T4": (16, 320),
    "L4": (24, 300),
    "RTX 4090": (24, 1008),
    "L40S": (48, 864),
    "A100": (80, 2039),
    "H100": (80, 3350),
    "H200": (141, 4800),
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}


@dataclass(frozen=True, slots=True)
class Size:
    """Of one model: weights of the language model's layers, of all else, of the output head.

    position_bytes: of keys and values, for one token of one slot, in 16 bits.
    """

    linear: int
    other: int
    head: int
    position_bytes: int

    def weights(self, kind: str | None) -> float:
        """Bytes of memory."""
        return needed_bytes(self.linear, self.other, 2, kind)

    def slots(self, card_gb: int, kind: str | None) -> int:
        """How many of CONTEXT tokens a card holds beside the weights, if it can load these."""
        card, weights = card_gb * 1e9, self.weights(kind)
        if weights * HEADROOM > card:
            return 0
        limits = EngineConfig(max_num_seqs=10_000)
        try:
            return fit(limits, CONTEXT, CONTEXT * self.position_bytes, card - weights).count
        except OutOfMemory:
            return 0

    def tokens_s(self, gb_s: int, kind: str | None) -> float:
        """Of one answer at most: each token reads the layers, the head, and what stands before."""
        read = needed_bytes(self.linear, self.head, 2, kind) + BEFORE * self.position_bytes
        return gb_s * 1e9 / read


def _text(kind: str, hidden: int, layers: int, heads: int, kv: int, mlp: int, words: int) -> Any:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    more = {"num_key_value_heads": kv, "intermediate_size": mlp, "vocab_size": words}
    return {"model_type": kind, **sizes, **more}


def _next(text: Any) -> Any:
    return transformers.LlavaNextConfig(text_config=text)  # the tower of LLaVA-1.5 is its default


def _onevision(text: Any, *, tied: bool = False) -> Any:
    vision = {**_SIGLIP, "num_hidden_layers": 26, "image_size": 384}
    return transformers.LlavaOnevisionConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied
    )


def _qwen(text: Any, mlp: int, *, tied: bool = False) -> Any:
    vision = {"hidden_size": 1280, "depth": 32, "num_heads": 16, "intermediate_size": mlp}
    vision["out_hidden_size"] = text["hidden_size"]
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied
    )


def _gemma(head_dim: int, text: Any) -> Any:
    vision = {**_SIGLIP, "num_hidden_layers": 27, "image_size": 896}
    return transformers.Gemma3Config(
        text_config={**text, "head_dim": head_dim}, vision_config=vision
    )


def configs() -> Mapping[str, Any]:
    """Of models that people serve. Source: `engine/shapes.py`, and the models' own config.json."""
    yi = _text("llama", 7168, 60, 56, 8, 20480, 64064)
    return {
        "LLaVA-1.5 7B": random_config(SHAPES["llava-1.5-7b"]),
        "LLaVA-1.5 13B": random_config(SHAPES["llava-1.5-13b"]),
        "LLaVA-NeXT Mistral 7B": _next(_text("mistral", 4096, 32, 32, 8, 14336, 32064)),
        "LLaVA-NeXT 34B": _next(yi),
        "LLaVA-OneVision 0.5B": _onevision(_text("qwen2", 896, 24, 14, 2, 4864, 152000), tied=True),
        "LLaVA-OneVision 7B": _onevision(_text("qwen2", 3584, 28, 28, 4, 18944, 152128)),
        "Qwen2.5-VL 3B": _qwen(
            _text("qwen2_5_vl_text", 2048, 36, 16, 2, 11008, 151936), 3420, tied=True
        ),
        "Qwen2.5-VL 7B": _qwen(_text("qwen2_5_vl_text", 3584, 28, 28, 4, 18944, 152064), 3420),
        "Qwen2.5-VL 32B": _qwen(_text("qwen2_5_vl_text", 5120, 64, 40, 8, 27648, 152064), 3456),
        "Qwen2.5-VL 72B": _qwen(_text("qwen2_5_vl_text", 8192, 80, 64, 8, 29568, 152064), 3456),
        "Gemma 3 4B": _gemma(256, _text("gemma3_text", 2560, 34, 8, 4, 10240, 262208)),
        "Gemma 3 12B": _gemma(256, _text("gemma3_text", 3840, 48, 16, 8, 15360, 262208)),
        "Gemma 3 27B": _gemma(128, _text("gemma3_text", 5376, 62, 32, 16, 21504, 262208)),
    }


def size_of(config: Any) -> Size:
    """Of the model that the config describes."""
    with on_meta():
        model: Any = transformers.AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    tensors = {id(t): (name, t.numel()) for name, t in model.state_dict(keep_vars=True).items()}
    linear = sum(count for name, count in tensors.values() if is_linear(name))
    other = sum(count for _, count in tensors.values()) - linear
    head = model.get_output_embeddings().weight.numel()
    kept = shape_of(model).position_bytes(torch.bfloat16, torch.bfloat16)
    return Size(linear, other, head, kept)


def tables(sizes: Mapping[str, Size]) -> str:
    """The three of them, in Markdown."""
    return "\n".join([*_memory(sizes), "", *_slots(sizes), "", *_speed(sizes)])


def _memory(sizes: Mapping[str, Size]) -> Iterator[str]:
    yield "| computed: GB | weights, 16 bits | 8 bits | 4 bits | keys and values of 1,000 tokens |"
    yield "|---|---|---|---|---|"
    for name, size in sizes.items():
        weights = " | ".join(f"{size.weights(kind) / 1e9:.1f}" for kind in KINDS)
        yield f"| {name} | {weights} | {size.position_bytes * 1e3 / 1e9:.3f} |"


def _slots(sizes: Mapping[str, Size]) -> Iterator[str]:
    cards = sorted({gb for gb, _ in CARDS.values()})
    yield f"| computed: slots of {CONTEXT:,} tokens | {' | '.join(f'{gb} GB' for gb in cards)} |"
    yield "|---|" + "---|" * len(cards)
    for name, size in sizes.items():
        cells = (" / ".join(str(size.slots(gb, kind) or "–") for kind in KINDS) for gb in cards)
        yield f"| {name} | {' | '.join(cells)} |"


def _speed(sizes: Mapping[str, Size]) -> Iterator[str]:
    heads = " | ".join(f"{name}, {speed} GB/s" for name, (_, speed) in CARDS.items())
    yield f"| computed: tokens/s at most | {heads} |"
    yield "|---|" + "---|" * len(CARDS)
    for name, size in sizes.items():
        yield f"| {name} | {' | '.join(_bounds(size, *card) for card in CARDS.values())} |"


def _bounds(size: Size, card_gb: int, gb_s: int) -> str:
    bounds = (
        f"{size.tokens_s(gb_s, kind):.0f}" if size.slots(card_gb, kind) else "–" for kind in KINDS
    )
    return " / ".join(bounds)


def page(text: str, made: str) -> str:
    """The page with the tables between their marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Write them."""
    made = tables({name: size_of(config) for name, config in configs().items()})
    PAGE.write_text(page(PAGE.read_text("utf-8"), made), "utf-8")


if __name__ == "__main__":
    main()
