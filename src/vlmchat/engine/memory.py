"""How much memory a model needs, whether the machine has it, and what torch says if not.

The loader asks, with a model on the meta device whose shapes are all known, before it reads any
weight; loader and runner wrap what may still run out of memory.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from vlmchat.engine.assemble import Precision
from vlmchat.engine.weights import HEADROOM, is_linear, needed_bytes
from vlmchat.errors import OutOfMemory

# torch has a class of its own for CUDA only: its CPU allocator, Metal and cuBLAS say it in words.
_OUT_OF_MEMORY = re.compile("allocate memory|not enough memory|out of memory|ALLOC_FAILED")
_OMP_PAUSE_HARD = 2  # OpenMP 5.0, omp_pause_resource_t


def check_memory(model: Any, precision: Precision) -> float:
    """Bytes the weights will take; raises OutOfMemory when the device has less free."""
    tensors = {id(t): (name, t.numel()) for name, t in model.state_dict(keep_vars=True).items()}
    linear = sum(count for name, count in tensors.values() if is_linear(name))
    other = sum(count for _, count in tensors.values()) - linear

    def need(kind: str | None) -> float:
        return needed_bytes(linear, other, precision.dtype.itemsize, kind)

    needed, free = need(precision.kind), free_bytes(precision.device)
    if needed * HEADROOM > free:
        smaller = [k for k in ("8bit", "4bit") if need(k) < needed and need(k) * HEADROOM <= free]
        advice = f"add --load-{smaller[0]} or " if smaller else ""
        raise OutOfMemory(
            f"the model needs {needed * HEADROOM / 1e9:.1f} GB on {precision.device}, "
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


def give_threads_back() -> None:
    """End OpenMP's threads that the calling thread has used, where torch has GNU's OpenMP.

    Each Python thread that computes gets a team of its own; with two of them there are more threads
    than cores, and then OpenMP lets them sleep between any two operations.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.exists():
        pause = getattr(ctypes.CDLL(str(library)), "omp_pause_resource_all", None)
        if pause is not None:
            pause(_OMP_PAUSE_HARD)


def free_bytes(device: torch.device) -> float:
    """What the device has free now."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)
