"""Open a checkpoint in LLaVA's own layout: whole, or a LoRA or a projector on a base.

Called by the loader. Finds base and tower, reads settings and tokenizer, builds the model without
memory; the weights come as a stream, by the model's names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmchat.engine.assemble import Opened
from vlmchat.engine.checkpoint import Layout
from vlmchat.engine.hf_checkpoint import damaged_files, read_generation_config
from vlmchat.engine.hub import LORA_REST, PROJECTOR, find_base, find_tower, read_config, read_json
from vlmchat.engine.llava import check_original, language_model
from vlmchat.engine.llava_config import read_pictures, read_tokens, read_vision, translate
from vlmchat.engine.llava_model import OriginalLlava
from vlmchat.engine.llava_pixels import PixelMaker
from vlmchat.engine.llava_processor import OriginalProcessor, PromptTokenizer
from vlmchat.engine.llava_tokenizer import read_tokenizer
from vlmchat.engine.llava_weights import (
    Parts,
    check_delta,
    check_names,
    has_tower,
    original_tensors,
    read_overlay,
)
from vlmchat.engine.lora import Lora
from vlmchat.engine.schemes import read_scheme
from vlmchat.engine.spare import on_meta
from vlmchat.engine.tensors import model_files
from vlmchat.errors import CheckpointError, ConfigError

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Source:
    """The language model's directory and files, and what stands in place of parts of it."""

    directory: Path
    files: list[Path]
    overlay: Mapping[str, torch.Tensor]
    lora: Lora | None


def open_original(
    directory: Path,
    config: Mapping[str, Any],
    layout: Layout,
    name: str,
    base: str | None,
    progress: Progress,
) -> Opened:
    """name: what messages call the checkpoint.  base: --model-base.

    Raises UnsupportedModel, CheckpointError, ConfigError, and what `find_base` raises.
    """
    check_original(config, name)
    source = _source(directory, config, layout, name, base, progress)
    inside = bool(config.get("unfreeze_mm_vision_tower")) and has_tower(
        source.files, source.overlay
    )
    tower = find_tower(config["mm_vision_tower"], directory, progress, weights=not inside)
    # The original takes the Rust tokenizer for whole Mistral checkpoints, and for these only.
    fast = layout is Layout.ORIGINAL and language_model(config) == "mistral"
    with damaged_files(name):
        tokenizer = read_tokenizer(source.directory, fast=fast)
        return _opened(config, name, source, tower, inside, tokenizer)


def _opened(
    config: Mapping[str, Any],
    name: str,
    source: _Source,
    tower: Path,
    inside: bool,
    tokenizer: Any,
) -> Opened:
    """inside: whether the tower's weights are the checkpoint's own."""
    vision = read_vision(tower)
    pictures = read_pictures(config, vision, name)
    tokens = read_tokens(config)
    tokenizer.add_tokens(tokens.added)
    rows = len(tokenizer)
    scheme = read_scheme(read_config(source.directory), name)
    with on_meta():
        model = OriginalLlava(translate(config, vision, pictures, rows), pictures)
    parts = Parts(
        source.files,
        None if inside else tower,
        rows,
        pictures.newline,
        source.overlay,
        source.lora,
        scheme,
    )
    processor = OriginalProcessor(
        PromptTokenizer(tokenizer, rows), PixelMaker(tower, pictures), pictures, tokens.marks
    )
    limit = config.get("tokenizer_model_max_length")
    return Opened(
        model,
        original_tensors(parts),
        processor,
        read_generation_config(source.directory, model),
        limit if isinstance(limit, int) and limit > 0 else None,
        source.directory,
        scheme,
    )


def _source(
    directory: Path,
    config: Mapping[str, Any],
    layout: Layout,
    name: str,
    base: str | None,
    progress: Progress,
) -> _Source:
    if layout is Layout.ORIGINAL:
        if base is not None:
            raise ConfigError(f"--model-base {base}: {name} is a whole model, it takes no base")
        files = model_files(directory)
        check_names(files, name)
        check_delta(files, name)
        return _Source(directory, files, {}, None)
    named_by = name if base is None else None
    base = base or _named_base(directory, layout, name)
    progress(f"{name} goes on top of the base {base}")
    # The base is large: first what is needed of the tower in any case.
    own_tower = bool(config.get("unfreeze_mm_vision_tower"))
    find_tower(config["mm_vision_tower"], directory, progress, weights=not own_tower)
    base_directory = find_base(base, named_by, progress, text=True)
    files = model_files(base_directory)
    check_names(files, f"the base {base}")
    if layout is Layout.PROJECTOR_ONLY:
        return _Source(base_directory, files, read_overlay(directory / PROJECTOR), None)
    rest = directory / LORA_REST
    if not rest.is_file():
        raise CheckpointError(f"{name} lacks {LORA_REST}, which holds its projector")
    lora = Lora(directory)
    return _Source(base_directory, files, {**lora.replacements, **read_overlay(rest)}, lora)


def _named_base(directory: Path, layout: Layout, name: str) -> str:
    """The base that a LoRA itself names. ConfigError if it names none, or none that is here."""
    kind = "a LoRA" if layout is Layout.ORIGINAL_LORA else "a projector"
    named = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    made_from = named or read_json(directory / "config.json").get("_name_or_path")
    if layout is Layout.ORIGINAL_LORA and named and "/" in named:
        return str(named)
    hint = f"; its files name {made_from}" if made_from else ""
    raise ConfigError(
        f"{name} holds {kind} only, no whole model: give the model that it was made from "
        f"by --model-base{hint}"
    )
