"""Read a checkpoint's tensors, one at a time: safetensors, or pickles that hold tensors only.

Used by the loader. A file is mapped, not read: a tensor costs memory when it is used, and one
file's tensors at most are held at once. Knows nothing of models.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vlmchat.engine.hub import is_weights, read_json, weight_files
from vlmchat.errors import CheckpointError

NamedTensor = tuple[str, torch.Tensor]


def model_files(directory: Path) -> list[Path]:
    """The files of a whole model's weights; empty where there are none.

    Raises CheckpointError where an index names files that are not there.
    """
    present = {file.name for file in directory.iterdir()}
    chosen = weight_files(sorted(present))
    kinds = {Path(name).suffix for name in chosen}
    for index in sorted(directory.glob("*.index.json")):
        shards = set(read_json(index).get("weight_map", {}).values())
        absent = sorted(
            shard
            for shard in shards - present
            if is_weights(shard) and (not kinds or Path(shard).suffix in kinds)
        )
        if absent:
            raise CheckpointError(
                f"{directory} lacks {', '.join(absent[:3])}, which {index.name} names; "
                "download the checkpoint again"
            )
    return [directory / name for name in chosen]


def read_tensors(files: Iterable[Path]) -> Iterator[NamedTensor]:
    """Every tensor with its name, on the CPU, as stored.

    Raises CheckpointError for a file that is broken, or a pickle that holds more than tensors.
    """
    for file in files:
        with _reading(file):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a dict)
                        yield name, tensors.get_tensor(name)
            else:
                yield from _unpickle(file, "cpu").items()


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by name; no weights are read. Raises as `read_tensors` does."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _reading(file):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        shapes[name] = tuple(tensors.get_slice(name).get_shape())
            else:
                shapes |= {n: tuple(t.shape) for n, t in _unpickle(file, "meta").items()}
    return shapes


def _unpickle(file: Path, device: str) -> dict[str, torch.Tensor]:
    # Files of torch before 1.6 are no zip archives, and cannot be mapped.
    mapped = zipfile.is_zipfile(file)
    content: Any = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by name")
    if strangers := [name for name, t in content.items() if not isinstance(t, torch.Tensor)]:
        raise ValueError(f"{strangers[0]} is not a tensor")
    return content


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Errors of the two formats as ours. Those of whoever takes the tensors pass through."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and is not opened, since a pickle can run any code; "
            "take the checkpoint as safetensors, or from another source"
        ) from error
    except (SafetensorError, OSError, EOFError, ValueError, RuntimeError, KeyError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise CheckpointError(f"{file} is broken ({lines[0]}); download it again") from error
