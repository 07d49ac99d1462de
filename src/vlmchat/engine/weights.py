"""Which tensors a checkpoint's files hold, read from their headers: no torch, no tensor read.

Used by `vlmchat models` and to tell before loading how much memory a model needs. A safetensors
file begins with its table; a torch archive is a zip with the table as a pickle, which is read here
with every name refused but those of tensors, so that nothing in it can run.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from vlmchat.engine.hub import is_weights, needed_files
from vlmchat.engine.schemes import read_scheme
from vlmchat.errors import CheckpointError, UnsupportedModel

# Bytes per weight of the language model's linear layers: 8 or 4 bits, and their scales. Where the
# device decides, the most.
QUANTIZED_BYTES = {"8bit": 1.01, "4bit": 0.63}
QUANTIZED_BYTES |= {"int8": 1.01, "int4": 0.63, "bnb-int8": 1.01, "bnb-nf4": 0.52}
# Room for activations, the first keys and values, and what loading itself allocates.
HEADROOM = 1.1

_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "F16": 2}
_ITEM_BYTES |= {"BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}
# torch's storage classes, by the names that safetensors uses.
_STORAGES = {"Half": "F16", "BFloat16": "BF16", "Float": "F32", "Double": "F64", "Long": "I64"}
_STORAGES |= {"Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"}
# What json, zipfile and pickle raise for bytes that are not theirs.
_SIGNS_OF_DAMAGE: tuple[type[Exception], ...] = (
    *(ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, ArithmeticError),
    *(RuntimeError, MemoryError, struct.error, zlib.error),
)
# Beside the weights of layers that are stored quantised.
_BESIDE = (
    *("qzeros", "scales", "g_idx", "SCB", "weight_format", "input_scale", "weight_scale_inv"),
    *("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
)
_MAX_HEADER_BYTES = 100_000_000  # Source: the safetensors format


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as its file's table has it; dtype in the words of safetensors."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_weights(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """All tensors in the files that running the model takes, by name.

    Raises CheckpointError where a file is not whole, or has no table that can be read.
    """
    names = [file.name for file in directory.iterdir()]
    weights = [name for name in needed_files(names) if is_weights(name)]
    return {
        name: header
        for file in sorted(weights)
        for name, header in read_header(directory / file).items()
    }


def read_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one file. Raises CheckpointError with the file's name."""
    try:
        return _safetensors(file) if file.suffix == ".safetensors" else _torch_archive(file)
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    except _SIGNS_OF_DAMAGE as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{file} is broken ({lines[0]}); download it again") from error


def is_linear(name: str) -> bool:
    """Whether a tensor is one of the language model's linear layers, which quantising shrinks."""
    elsewhere = "vision" in name or "visual" in name or "projector" in name
    return "layers." in name and name.endswith("_proj.weight") and not elsewhere


def count_weights(tensors: Mapping[str, TensorHeader]) -> tuple[int, int]:
    """Numbers of weights in the language model's linear layers, and in everything else."""
    linear = sum(t.num_weights for name, t in tensors.items() if is_linear(name))
    return linear, sum(t.num_weights for t in tensors.values()) - linear


def as_plain(
    tensors: Mapping[str, TensorHeader], config: Mapping[str, Any], name: str
) -> dict[str, TensorHeader]:
    """The tensors, with those of weights that are stored quantised as the weights themselves.

    So that they can be counted; shapes are flat then. Where the way of storing is not served, as
    they are.
    """
    try:
        scheme = read_scheme(config, name)
    except UnsupportedModel:
        scheme = None
    if scheme is None:
        return dict(tensors)
    found = {}
    for each, tensor in tensors.items():
        module, _, part = each.rpartition(".")
        per_item = 1
        if part in ("qweight", "weight_packed"):
            per_item = 32 // (scheme.bits or 4)
        elif part == "weight" and tensor.dtype == "U8":
            per_item = 8 // scheme.bits
        elif part in _BESIDE or ".weight." in each:
            continue
        shape = tensor.shape if per_item == 1 else (tensor.num_weights * per_item,)
        found[each if per_item == 1 else f"{module}.weight"] = TensorHeader(
            tensor.file, tensor.dtype, shape
        )
    return found


def needed_bytes(linear: int, other: int, item_bytes: int, quantization: str | None) -> float:
    """Memory for so many weights (see `count_weights`), HEADROOM not included."""
    return linear * QUANTIZED_BYTES.get(quantization or "", item_bytes) + other * item_bytes


def _safetensors(file: Path) -> dict[str, TensorHeader]:
    """8 bytes of length, JSON, then the tensors without a gap."""
    num_bytes = file.stat().st_size
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size <= min(num_bytes, _MAX_HEADER_BYTES):
            raise ValueError("its header is longer than the file")
        table: dict[str, Any] = json.loads(stream.read(size))
    table.pop("__metadata__", None)
    end = 0
    for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != end or stop - start != math.prod(entry["shape"]) * _item_bytes(entry["dtype"]):
            raise ValueError(f"the place of {name} does not fit its shape")
        end = stop
    if 8 + size + end != num_bytes:
        raise ValueError(f"{num_bytes} bytes, not the {8 + size + end} that its header tells of")
    return {name: _header(file, e["dtype"], e["shape"]) for name, e in table.items()}


def _header(file: Path, dtype: str, shape: Any) -> TensorHeader:
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ValueError(f"a tensor of shape {shape}")
    return TensorHeader(file.name, dtype, tuple(shape))


def _item_bytes(dtype: str) -> int:
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"tensors of type {dtype}")
    return _ITEM_BYTES[dtype]


def _torch_archive(file: Path) -> dict[str, TensorHeader]:
    with zipfile.ZipFile(file) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        table = next((name for name in sizes if name.endswith("/data.pkl")), "")
        folder = table.removesuffix("data.pkl")
        stored = _Table(archive.read(table)).load()
    tensors = {}
    for name, (key, dtype, num_items, shape) in _named(stored):
        if sizes.get(f"{folder}data/{key}") != num_items * _item_bytes(dtype):
            raise ValueError(f"{name} is not whole")
        tensors[name] = _header(file, dtype, shape)
    return tensors


def _named(stored: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(stored, dict):
        raise pickle.UnpicklingError("it does not hold a table of tensors")
    return ((str(name), value) for name, value in stored.items() if isinstance(value, tuple))


class _Table(pickle.Unpickler):
    """Tensors come out as (storage key, dtype, numbers in the storage, shape)."""

    def __init__(self, data: bytes) -> None:
        super().__init__(BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, *_: (*storage, shape)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        kind = name.removesuffix("Storage")
        if module in ("torch", "torch.storage") and kind in _STORAGES:
            return _STORAGES[kind]
        raise pickle.UnpicklingError(f"it needs {module}.{name}, which is not allowed")

    def persistent_load(self, pid: Any) -> tuple[str, str, int]:
        _, dtype, key, _, num_items = pid
        return key, dtype, num_items
