"""Load a checkpoint: find it, open it, check that it fits, read its weights. No family is named.

Called by `Engine.load`. What a checkpoint is gets told from its config and its files, never from
its name. No code from a checkpoint is run, no pickle opened that holds more than tensors.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from vlmchat.config import DEMO_MODEL, QUANTIZATIONS, ModelConfig
from vlmchat.engine.adapters import base_of, read_adapter
from vlmchat.engine.assemble import Opened, Precision, assemble
from vlmchat.engine.checkpoint import Layout, layout_of
from vlmchat.engine.hf_checkpoint import open_hugging_face
from vlmchat.engine.hub import find_base, find_checkpoint, read_config
from vlmchat.engine.llava import is_original
from vlmchat.engine.memory import check_memory, memory_errors
from vlmchat.engine.prequantized import kept_kind
from vlmchat.engine.shapes import find_shape
from vlmchat.engine.spec import ModelSpec, check_config, read_spec, unapplied
from vlmchat.engine.templates import ConversationTemplate, template, template_for_checkpoint
from vlmchat.errors import CheckpointError, ConfigError, UnsupportedModel
from vlmchat.request import Status

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ADVICE = "out of memory while loading; use --load-4bit or a smaller model"

# Checkpoints as LLaVA's own code writes them.
ORIGINALS = (Layout.ORIGINAL, Layout.ORIGINAL_LORA, Layout.PROJECTOR_ONLY)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with its transformers processor and what the engine must know."""

    model: Any
    processor: Any
    spec: ModelSpec
    status: Status
    template: ConversationTemplate | None  # in place of the checkpoint's own
    team: Any = None  # `parallel.Team`: who has the other shares of the model


def load_model(
    config: ModelConfig, progress: Callable[[str], None], answer_tokens: int | None = None
) -> LoadedModel:
    """See `Engine.load`. answer_tokens: what the context must have room for besides a question."""
    started = time.perf_counter()
    _quiet_libraries()
    device = pick_device(config.device)
    kind = pick_kind(config.quantization, device)
    chosen = template(config.conv_mode) if config.conv_mode else None
    shape = find_shape(config.path)
    directory = find_checkpoint(DEMO_MODEL if shape else config.path, config.revision, progress)
    layout = layout_of(directory, read_config(directory))
    if shape is not None:
        from vlmchat.engine.random_model import open_random

        raw_config, opened = {"dtype": "bfloat16"}, open_random(shape, device)
    elif layout is Layout.ADAPTER:
        raw_config, opened = _open_adapter(directory, config, progress)
    else:
        raw_config = _read_config(directory)
        opened = _open(directory, raw_config, layout, config, progress)
    details = []
    if layout in ORIGINALS and chosen is None:
        settings = opened.tokenizer_directory or directory
        name, rule = template_for_checkpoint(settings, raw_config, config.path)
        told = f"prompt format {name}, by {rule}; --conv-mode chooses another"
        progress(told if "config.json" in rule else f"note: {told}")
        details.append(("prompt format by", rule))
        chosen = template(name)
    if ignored := ", ".join(unapplied(opened.generation_config)):
        progress(f"note: {ignored} in generation_config.json is not applied")
        details.append(("not applied", ignored))
    spec = _spec(opened, config.context_length, answer_tokens)
    if opened.scheme is not None:
        details.append(("weights stored by", opened.scheme.words))
    dtype, kept = pick_dtype(config.dtype, raw_config, device), kept_kind(opened.scheme, device)
    precision = Precision(device, dtype, kind, kept)
    num_bytes = check_memory(opened.model, precision)
    stage = f"loading {config.path} ({num_bytes / 1e9:.2f} GB, {_words(precision)})"
    counter = _Counter(len(opened.model.state_dict()), stage, progress)
    with memory_errors(_ADVICE):
        assemble(opened.model, opened.tensors, precision, config.path, counter)
    return _finish(config, opened, chosen, precision, spec, started, details)


def _open(
    directory: Path,
    raw_config: dict[str, Any],
    layout: Layout,
    config: ModelConfig,
    progress: Callable[[str], None],
) -> Opened:
    """The checkpoint by its layout. Raises as `load_model` does."""
    check_config(raw_config, config.path)
    if layout in ORIGINALS:
        from vlmchat.engine.llava_checkpoint import open_original

        return open_original(directory, raw_config, layout, config.path, config.base, progress)
    if config.base is not None:
        raise ConfigError(
            f"--model-base {config.base}: {config.path} is a whole model, it takes no base"
        )
    return open_hugging_face(directory)


def _open_adapter(
    directory: Path, config: ModelConfig, progress: Callable[[str], None]
) -> tuple[dict[str, Any], Opened]:
    """A PEFT adapter on a base in transformers' layout: the base's config, and both as one."""
    base = config.base or base_of(directory)
    progress(f"{config.path} goes on top of the base {base}")
    base_directory = find_base(base, None if config.base else config.path, progress)
    raw_config = _read_config(base_directory)
    check_config(raw_config, base)
    if is_original(raw_config):
        raise UnsupportedModel(
            f"{config.path} is an adapter without a LLaVA config, its base {base} is in LLaVA's "
            "own layout; give the same base in the Hugging Face layout by --model-base"
        )
    opened = open_hugging_face(base_directory)
    lora = read_adapter(directory, opened.model.state_dict())
    return raw_config, replace(opened, tensors=lora.merged(opened.tensors))


def _finish(
    config: ModelConfig,
    opened: Opened,
    chosen: ConversationTemplate | None,
    precision: Precision,
    spec: ModelSpec,
    started: float,
    more: list[tuple[str, str]],
) -> LoadedModel:
    """more: details of the status that the caller knows."""
    details = [
        ("family", spec.family),
        ("device", str(precision.device)),
        ("precision", _words(precision)),
    ]
    if chosen is not None:
        details.append(("template", chosen.name))
    status = Status(
        model=config.path,
        context_length=spec.context_length,
        load_s=time.perf_counter() - started,
        details=(*details, *more),
    )
    return LoadedModel(opened.model, opened.processor, spec, status, chosen)


def _words(precision: Precision) -> str:
    return precision.kind or str(precision.dtype).removeprefix("torch.")


class _Counter:
    """Tells the stage with a bar, whenever another hundredth of the tensors has arrived."""

    def __init__(self, total: int, stage: str, progress: Callable[[str], None]) -> None:
        self._total = max(total, 1)
        self._stage = stage
        self._progress = progress
        self._shown = -1

    def __call__(self, number: int) -> None:
        percent = min(100 * number // self._total, 100)
        if percent != self._shown:
            self._shown = percent
            bar = "━" * (percent // 5) + "╌" * (20 - percent // 5)
            self._progress(f"{self._stage} {bar} {number}/{self._total} tensors")


def pick_device(name: str) -> torch.device:
    """The torch device of --device; ConfigError if this machine has none such."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: give auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine shows {torch.cuda.device_count()} CUDA devices; "
            "check CUDA_VISIBLE_DEVICES, or use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device {name}: this machine has no Metal GPU; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device {name}: give auto, cpu, cuda, cuda:N or mps")
    return device


def pick_dtype(name: str, raw_config: dict[str, Any], device: torch.device) -> torch.dtype:
    """The dtype of --dtype. auto is the checkpoint's own, but bfloat16 for float16 on a CPU."""
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"--dtype {name}: give auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    own = raw_config.get("dtype") or raw_config.get("torch_dtype")
    dtype = DTYPES.get(str(own), torch.float32)
    if dtype is torch.float16 and device.type == "cpu":
        return torch.bfloat16
    return dtype


def pick_kind(asked: str | None, device: torch.device) -> str | None:
    """The kind of quantised layers: asked for by name, or 8bit or 4bit as is best on the device."""
    if asked is None:
        return None
    if asked not in QUANTIZATIONS:
        raise ConfigError(f"--quantization {asked}: give {', '.join(QUANTIZATIONS[2:])}")
    on_cpu = device.type == "cpu"
    if asked in ("int8", "int4") and not on_cpu:
        raise ConfigError(
            f"--quantization {asked} is for CPUs, the device is {device}; "
            f"use bnb-{'nf4' if asked == 'int4' else 'int8'}, or --device cpu"
        )
    by_device = ("int8", "int4") if on_cpu else ("bnb-int8", "bnb-nf4")
    return dict(zip(("8bit", "4bit"), by_device, strict=True)).get(asked, asked)


def _spec(opened: Opened, context_length: int | None, answer_tokens: int | None) -> ModelSpec:
    """What the engine must know, with the context length asked for, which must hold an answer."""
    spec = read_spec(opened.model.config, opened.generation_config, opened.processor)
    if opened.context_limit is not None:
        spec = replace(spec, context_length=min(spec.context_length, opened.context_limit))
    if context_length is not None:
        if not 1 <= context_length <= spec.context_length:
            raise ConfigError(
                f"--context-length {context_length}: the model takes 1 to {spec.context_length} "
                "tokens"
            )
        spec = replace(spec, context_length=context_length)
    if answer_tokens is not None and answer_tokens >= spec.context_length:
        raise ConfigError(
            f"--max-new-tokens {answer_tokens} leaves no room for a question in a context of "
            f"{spec.context_length} tokens; lower it"
        )
    return spec


def _quiet_libraries() -> None:
    """Casts, optional kernels, missing torchvision: nothing that a user can act on."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return config
