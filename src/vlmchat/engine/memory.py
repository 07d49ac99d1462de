"""How much memory a checkpoint needs, whether the machine has it, and what torch says if not.

The loader asks before it reads any weight; loader and runner wrap what may still run out of
memory. Reads safetensors headers only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from vlmchat.errors import CheckpointError, OutOfMemory

# Bytes per weight of the language model's linear layers. NF4: 4 bits and its block statistics.
QUANTIZED_BYTES = {"8bit": 1.01, "4bit": 0.52}
# Room for activations, the first keys and values, and what loading itself allocates.
HEADROOM = 1.1
# torch has a class of its own for CUDA only: its CPU allocator, Metal and cuBLAS say it in words.
_OUT_OF_MEMORY = re.compile("allocate memory|not enough memory|out of memory|ALLOC_FAILED")


def check_memory(
    directory: Path, device: torch.device, dtype: torch.dtype, quantization: str | None
) -> float:
    """Bytes the weights will take; raises OutOfMemory when the device has less free."""
    linear, other = _count_weights(directory)

    def need(kind: str | None) -> float:
        return linear * QUANTIZED_BYTES.get(kind or "", dtype.itemsize) + other * dtype.itemsize

    needed, free = need(quantization), _free_bytes(device)
    if needed * HEADROOM > free:
        smaller = [k for k in QUANTIZED_BYTES if need(k) < needed and need(k) * HEADROOM <= free]
        advice = f"add --load-{smaller[0]} or " if smaller else ""
        raise OutOfMemory(
            f"the model needs {needed * HEADROOM / 1e9:.1f} GB on {device}, "
            f"{free / 1e9:.1f} GB are free; {advice}choose a smaller model"
        )
    return needed


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Turn every way in which Python and torch run out of memory into OutOfMemory(message)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        raise OutOfMemory(message) from error


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def _count_weights(directory: Path) -> tuple[int, int]:
    """Numbers of weights in the language model's linear layers, and in everything else."""
    linear = other = 0
    for file in directory.glob("*.safetensors"):
        for name, shape in _shapes(file).items():
            count = math.prod(shape)
            if "language_model" in name and name.endswith("_proj.weight"):
                linear += count
            else:
                other += count
    # Pickled shards are not opened here: released ones hold two bytes per weight.
    if not linear + other:
        linear = sum(file.stat().st_size for file in directory.glob("*.bin")) // 2
    return linear, other


def _shapes(file: Path) -> dict[str, list[int]]:
    """Tensor shapes from a safetensors header: 8 bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > file.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        return {name: tensor["shape"] for name, tensor in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is broken ({error}); download it again") from error
