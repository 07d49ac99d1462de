"""Tiny checkpoints in the forms that LLaVA's own code writes, and what that code makes of them.

Seeded random weights, a real SentencePiece tokenizer, a tiny CLIP repository; no network. The
reference takes nothing from the package: plain Llama and CLIP of transformers, features spliced in.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)

from vlmchat.engine.hf_processor import read_processor
from vlmchat.engine.templates import TEMPLATE_NAMES, template

TILE = 28  # pixels; two patches of 14 along each side
GRIDS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE]]
HIDDEN, VISION_HIDDEN = 64, 32
ANYRES: dict[str, Any] = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": GRIDS,
    "mm_patch_merge_type": "spatial_unpad",
}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Original:
    """One checkpoint. tensors: of the language model and what is beside it; tower: of the tower."""

    directory: Path
    config: dict[str, Any]
    tensors: Tensors
    tower: Tensors


@cache
def sentencepiece_model(*, dummy_prefix: bool = True) -> bytes:
    """A trained tokenizer.model of the kind Llama has: BPE, byte fallback, <unk> <s> </s>."""
    corpus = [template(name).jinja for name in TEMPLATE_NAMES] + ["red green blue picture"] * 9
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def num_pieces() -> int:
    """Of the trained tokenizer."""
    return int(sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).vocab_size())


def write_json(file: Path, **content: Any) -> None:
    """A JSON file."""
    file.write_text(json.dumps(content))


def write_tokenizer(directory: Path, *, dummy_prefix: bool = True, **settings: Any) -> None:
    """tokenizer.model and tokenizer_config.json."""
    model = sentencepiece_model(dummy_prefix=dummy_prefix)
    (directory / "tokenizer.model").write_bytes(model)
    defaults = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "legacy": False,
    }
    write_json(directory / "tokenizer_config.json", **(defaults | settings))


def write_tower(directory: Path, seed: int = 5) -> Tensors:
    """A whole CLIP repository, text half included; the tensors of its vision half."""
    directory.mkdir(parents=True)
    small = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": VISION_HIDDEN}
    vision = small | {"image_size": TILE, "patch_size": 14, "intermediate_size": 48}
    words = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config=small | words | {"intermediate_size": 48},
        vision_config=vision,
        projection_dim=16,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if "position_ids" not in name}
    torch.save(tensors, directory / "pytorch_model.bin")
    config.save_pretrained(directory)
    write_json(
        directory / "preprocessor_config.json",
        image_processor_type="CLIPImageProcessor",
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        resample=3,
    )
    return {name: t for name, t in tensors.items() if name.startswith("vision_model.")}


def projector_tensors(kind: str, make: Callable[..., Tensor]) -> Tensors:
    """`linear`, `mlpNx_gelu` or `identity`, under LLaVA's names."""
    if kind == "identity":
        return {}
    if kind == "linear":
        return {
            "model.mm_projector.weight": make(HIDDEN, VISION_HIDDEN),
            "model.mm_projector.bias": make(HIDDEN),
        }
    tensors = {}
    for layer in range(int(kind[3])):
        width = HIDDEN if layer else VISION_HIDDEN
        tensors[f"model.mm_projector.{2 * layer}.weight"] = make(HIDDEN, width)
        tensors[f"model.mm_projector.{2 * layer}.bias"] = make(HIDDEN)
    return tensors


def language_config(rows: int, **changes: Any) -> dict[str, Any]:
    """The language model's part of config.json, as LLaVA and Vicuna write it."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "vocab_size": rows,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        **changes,
    }


def language_tensors(rows: int, make: Callable[..., Tensor]) -> Tensors:
    """A Llama's tensors."""
    tensors = {
        "model.embed_tokens.weight": make(rows, HIDDEN),
        "lm_head.weight": make(rows, HIDDEN),
    }
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
    for layer in range(2):
        start = f"model.layers.{layer}"
        for name, shape in shapes.items():
            tensors[f"{start}.self_attn.{name}_proj.weight"] = make(*shape)
        for name, shape in {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}.items():
            tensors[f"{start}.mlp.{name}_proj.weight"] = make(*shape)
        for name in ("input", "post_attention"):
            tensors[f"{start}.{name}_layernorm.weight"] = 1 + make(HIDDEN)
        tensors[f"{start}.self_attn.rotary_emb.inv_freq"] = make(8)
    return tensors | {"model.norm.weight": 1 + make(HIDDEN)}


def maker(seed: int) -> Callable[..., Tensor]:
    """Random tensors of a shape, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator) * 0.2


def make_original(directory: Path, *, weights: str = "safetensors", **changes: Any) -> Original:
    """A whole checkpoint, 1.5 unless `changes` to config.json say otherwise.

    weights: safetensors, bin, or shards (of .bin). The tower is the checkpoint's neighbour.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tower = write_tower(directory.parent / f"{directory.name}-tower")
    rows = changes.pop("rows", num_pieces())
    config = {
        **language_config(rows),
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(directory.parent / f"{directory.name}-tower"),
        "mm_hidden_size": VISION_HIDDEN,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": False,
    } | changes
    config = {key: value for key, value in config.items() if value is not ...}  # ...: leave out
    make = maker(1)
    tensors = language_tensors(rows, make)
    tensors |= projector_tensors(config.get("mm_projector_type", "linear"), make)
    if "unpad" in config.get("mm_patch_merge_type", ""):
        tensors["model.image_newline"] = make(HIDDEN)
    write_json(directory / "config.json", **config)
    write_json(directory / "generation_config.json", bos_token_id=1, eos_token_id=2, top_p=0.6)
    write_tokenizer(directory)
    write_weights(directory, tensors, weights)
    return Original(directory, config, tensors, tower)


def write_weights(directory: Path, tensors: Tensors, form: str = "safetensors") -> None:
    """The tensors in one file, or in two shards with their index."""
    if form == "safetensors":
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    elif form == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, part in halves.items():
            torch.save({name: tensors[name] for name in part}, directory / file)
        index = {name: file for file, part in halves.items() for name in part}
        write_json(directory / "pytorch_model.bin.index.json", metadata={}, weight_map=index)


def make_base(directory: Path, *, rows: int | None = None, seed: int = 2) -> Tensors:
    """A text model as Vicuna is: the base of a LoRA or of a projector."""
    directory.mkdir(parents=True)
    rows = rows or num_pieces()
    tensors = language_tensors(rows, maker(seed))
    config = language_config(rows, model_type="llama", architectures=["LlamaForCausalLM"])
    write_json(directory / "config.json", **config)
    write_tokenizer(directory)
    write_weights(directory, tensors, "shards")
    return tensors


class OriginalReference:
    """The original's arithmetic over `tensors`, in float32."""

    def __init__(self, config: dict[str, Any], tensors: Tensors, tower: Tensors) -> None:
        self.config, self.tensors = config, tensors
        text = {k: v for k, v in config.items() if k in language_config(0)}
        text["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
        mistral = config["model_type"] == "llava_mistral"
        text |= {"sliding_window": None} if mistral else {}  # which the original does not heed
        kind, settings = (
            (MistralForCausalLM, MistralConfig) if mistral else (LlamaForCausalLM, LlamaConfig)
        )
        self.text: Any = kind(settings(**text)).eval()
        own = self.text.state_dict()
        self.text.load_state_dict({name: t for name, t in tensors.items() if name in own})
        vision = {name.removeprefix("vision_model."): t for name, t in tower.items()}
        settings = CLIPConfig.from_pretrained(config["mm_vision_tower"]).vision_config
        self.vision: Any = CLIPVisionModel(settings).eval()
        self.vision.load_state_dict(vision)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, 28, 28] -> [tiles, 4, hidden]."""
        states = self.vision(pixels, output_hidden_states=True).hidden_states
        chosen = states[self.config["mm_vision_select_layer"]]
        if self.config.get("mm_vision_select_feature", "patch") == "patch":
            chosen = chosen[:, 1:]
        kind = self.config.get("mm_projector_type", "linear")
        if kind == "identity":
            return Tensor(chosen)
        if kind == "linear":
            return self._linear(chosen, "model.mm_projector")
        for layer in range(int(kind[3])):
            chosen = nn.functional.gelu(chosen) if layer else chosen
            chosen = self._linear(chosen, f"model.mm_projector.{2 * layer}")
        return Tensor(chosen)

    def _linear(self, value: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return nn.functional.linear(value, weight, bias)

    @torch.no_grad()
    def logits(self, ids: list[int], features: list[Tensor]) -> Tensor:
        """[vocabulary] after a prompt, in which -200 stands for one picture's features."""
        parts, pictures = [], iter(features)
        for token in ids:
            if token == -200:
                parts.append(next(pictures))
            else:
                parts.append(self.text.get_input_embeddings()(torch.tensor([token])))
        return Tensor(self.text(inputs_embeds=torch.cat(parts)[None]).logits[0, -1])


def write_as_original(source: Path, directory: Path) -> Path:
    """The checkpoint in `source`, of transformers' LLaVA, in LLaVA's own layout: same weights."""
    model = LlavaForConditionalGeneration.from_pretrained(source)
    config, tower = model.config, directory / "tower"
    tower.mkdir(parents=True)
    tensors, vision = {}, {}
    renames = {
        "model.language_model.": "model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    }
    for name, tensor in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            vision[name.replace("model.vision_tower.", "vision_model.")] = tensor
        else:
            old = next((old for old in renames if name.startswith(old)), "")
            tensors[renames.get(old, "") + name.removeprefix(old)] = tensor.clone()
    config.vision_config.save_pretrained(tower)
    torch.save(vision, tower / "pytorch_model.bin")
    pictures = read_processor(source, config).image_processor
    # LLaVA knows no other way of sizing: the short side, then a crop.
    pictures.size = {"shortest_edge": config.vision_config.image_size}
    pictures.save_pretrained(tower)
    write_weights(directory, tensors)
    write_json(
        directory / "config.json",
        **config.text_config.to_dict()
        | {
            "model_type": "llava",
            "mm_vision_tower": "tower",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": config.vision_feature_layer,
            "mm_use_im_patch_token": False,
        },
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, directory / name)
    return directory
