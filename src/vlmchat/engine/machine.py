"""What a machine can do at most, and what a model asks of it: the bound of every speed.

Called by the bench command. A decoded token costs reading every weight once, and the keys and
values of what stands before it; a prefilled one costs arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmchat.engine.spare import on_meta

# Larger than any cache: what is measured is memory.
_BYTES = {"cpu": 2**28, "cuda": 2**31, "mps": 2**29}
_SIDE = {"cpu": 1536, "cuda": 8192, "mps": 2048}
_TRIALS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured: bytes per second read, and read plus written by a copy; operations per second."""

    read_bytes_s: float
    copy_bytes_s: float
    flops_s: float
    threads: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a model asks for.

    weight_bytes: read for each decoded token (or step of several rows).  kv_bytes: read for each
    position before it.  token_flops: of a prompt's token, attention aside.  attention_flops: for
    each pair of a token and one that it attends to.  picture_flops: of encoding one picture; 0
    where the config does not tell.
    """

    weight_bytes: int
    kv_bytes: int
    token_flops: float
    attention_flops: float
    picture_flops: float


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best of a few trials each, with all of torch's threads. Takes about a second."""
    size = _BYTES[device.type] // 4
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    read = min(_fastest(device, source.sum), _fastest(device, source.max))
    copy = _fastest(device, lambda: target.copy_(source))
    side = _SIDE[device.type]
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    product = _fastest(device, lambda: matrix @ matrix)
    num_bytes = 4.0 * size
    return Machine(
        num_bytes / read, 2 * num_bytes / copy, 2.0 * side**3 / product, torch.get_num_threads()
    )


def _fastest(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest trial; the first warms up."""
    seconds = []
    for _ in range(_TRIALS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def work_of(model: Any) -> Work:
    """Of a loaded transformers model, quantised or not."""
    config, decoder = model.config.get_text_config(), model.get_decoder()
    with on_meta():
        bare = type(model)(model.config)  # as it was before its layers were packed
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_values = getattr(config, "num_key_value_heads", None) or heads
    return Work(
        weight_bytes=_bytes_read(decoder, model),
        kv_bytes=2 * layers * key_values * head_dim * model.dtype.itemsize,
        token_flops=2.0 * _linear_weights(bare.get_decoder()),
        attention_flops=4.0 * layers * heads * head_dim,
        picture_flops=_picture_flops(bare),
    )


def _bytes_read(decoder: nn.Module, model: Any) -> int:
    """Of the language model's layers and the output head, each storage once; no embeddings."""
    looked_up = model.get_input_embeddings()
    tensors = [
        tensor
        for module in decoder.modules()
        if module is not looked_up
        for tensor in (*module._parameters.values(), *module._buffers.values())
    ]
    tensors += model.get_output_embeddings().parameters()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t is not None
    }
    return sum(storages.values())


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _picture_flops(bare: Any) -> float:
    """Of LLaVA's towers: patches and one more position through the layers, then the projector."""
    vision = getattr(bare.config, "vision_config", None)
    tower = getattr(getattr(bare, "model", bare), "vision_tower", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if vision is None or tower is None or not isinstance(size, int) or not isinstance(patch, int):
        return 0.0
    positions = (size // patch) ** 2 + 1
    attention = 4.0 * vision.num_hidden_layers * vision.hidden_size * positions**2
    projector = getattr(bare.model, "multi_modal_projector", None)
    weights = _linear_weights(tower) + (_linear_weights(projector) if projector else 0)
    return float(2.0 * weights * positions + attention)
