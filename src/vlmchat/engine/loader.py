"""Load a checkpoint: find it, check that it fits, read it, quantise it. No family is named here.

Called by `Engine.load`. transformers does the reading; nothing is unpickled beyond weights and no
code from a checkpoint is run.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from vlmchat.config import ModelConfig
from vlmchat.engine.hub import find_checkpoint
from vlmchat.engine.memory import check_memory, memory_errors
from vlmchat.engine.spec import ModelSpec, check_config, read_spec
from vlmchat.engine.templates import ConversationTemplate, template
from vlmchat.errors import CheckpointError, ConfigError, OutOfMemory, UnsupportedModel
from vlmchat.request import Status

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ADVICE = "out of memory while loading; use --load-4bit or a smaller model"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with its transformers processor and what the engine must know."""

    model: Any
    processor: Any
    spec: ModelSpec
    status: Status
    template: ConversationTemplate | None  # in place of the checkpoint's own


def load_model(config: ModelConfig, progress: Callable[[str], None]) -> LoadedModel:
    """See `Engine.load`."""
    started = time.perf_counter()
    _quiet_libraries()
    device = pick_device(config.device)
    chosen = template(config.conv_mode) if config.conv_mode else None
    if config.base is not None:
        raise UnsupportedModel("--model-base is not served yet; give a merged checkpoint")
    directory = find_checkpoint(config.path, config.revision, progress)
    raw_config = _read_config(directory)
    check_config(raw_config, config.path)
    dtype = pick_dtype(config.dtype, raw_config, device)
    num_bytes = check_memory(directory, device, dtype, config.quantization)
    progress(f"loading {config.path}: {num_bytes / 1e9:.2f} GB on {device}")
    # Weights in the files' own dtype are mapped, not copied: so they are taken to be quantised.
    model, processor = _read(directory, dtype if config.quantization is None else "auto")
    with memory_errors(_ADVICE):
        if config.quantization is not None:
            from vlmchat.engine.quantize import quantize

            progress(f"quantising to {config.quantization}")
            quantize(model, config.quantization, device, dtype)
        model.to(device).eval()
    spec = read_spec(model.config, model.generation_config, processor)
    context_length = _context_length(config.context_length, spec)
    status = Status(
        model=config.path,
        context_length=context_length,
        load_s=time.perf_counter() - started,
        details=(
            ("family", spec.family),
            ("device", str(device)),
            ("precision", config.quantization or str(dtype).removeprefix("torch.")),
            ("runner", "eager"),
        ),
    )
    return LoadedModel(model, processor, spec, status, chosen)


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


def _context_length(asked: int | None, spec: ModelSpec) -> int:
    if asked is None:
        return spec.context_length
    if not 1 <= asked <= spec.context_length:
        raise ConfigError(
            f"--context-length {asked}: the model takes 1 to {spec.context_length} tokens"
        )
    return asked


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


def _read(directory: Path, dtype: torch.dtype | Literal["auto"]) -> tuple[Any, Any]:
    """Model and processor; CheckpointError where tensors are missing, unexpected or misshapen."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(directory, **options)
        with memory_errors(_ADVICE):
            model, info = AutoModelForImageTextToText.from_pretrained(
                directory,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they come back by name: refused below
                **options,
            )
    except OutOfMemory:
        raise
    except Exception as error:  # wrong files make the libraries trip over whatever is in them
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{directory} cannot be loaded: {first_line}") from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, info[problem])):
            shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
            kind = problem.removesuffix("_keys")
            raise CheckpointError(f"{directory} has {len(names)} {kind} tensors: {shown}")
    return model, processor
