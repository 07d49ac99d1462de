"""Tables of tensors: the same as torch's and safetensors' own readers give, and safe to read."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmchat.engine.weights import count_weights, read_header, read_headers
from vlmchat.errors import CheckpointError

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TENSORS = {str(dtype): torch.zeros(2, 3).to(dtype) for dtype in DTYPES}


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / str(request.param)
    write = save_file if path.suffix == ".safetensors" else torch.save
    write(TENSORS, path)
    return path


def test_headers_are_those_that_were_written(file: Path) -> None:
    found = read_header(file)
    assert {n: h.dtype for n, h in found.items()} == {str(d): name for d, name in DTYPES.items()}
    assert {header.shape for header in found.values()} == {(2, 3)}
    assert {header.file for header in found.values()} == {file.name}


def test_headers_of_views_and_parameters_have_their_own_shape(tmp_path: Path) -> None:
    whole = torch.zeros(4, 5)
    views = {"view": whole[1:, :2], "transposed": whole.T, "scalar": whole[0, 0]}
    parameter = {"parameter": torch.nn.Parameter(whole)}
    torch.save(views | parameter, tmp_path / "pytorch_model.bin")
    shapes = {name: header.shape for name, header in read_headers(tmp_path).items()}
    assert shapes == {"view": (3, 2), "transposed": (5, 4), "scalar": (), "parameter": (4, 5)}


def test_weights_that_quantising_shrinks_are_the_language_models(tmp_path: Path) -> None:
    names = {
        "model.layers.0.self_attn.q_proj.weight": 1,
        "language_model.model.layers.1.mlp.up_proj.weight": 2,
        "model.language_model.layers.0.self_attn.o_proj.weight": 4,
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": 8,
        "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight": 16,
        "model.layers.0.self_attn.q_proj.bias": 32,
        "lm_head.weight": 64,
        "model.mm_projector.0.weight": 128,
    }
    tensors = {name: torch.zeros(length) for name, length in names.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert count_weights(read_headers(tmp_path)) == (1 + 2 + 4, 8 + 16 + 32 + 64 + 128)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_headers_of_a_cut_file_are_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=file.name):
        read_header(file)


def test_headers_of_a_damaged_file_are_refused_or_read_but_never_crash(file: Path) -> None:
    """Seeded damage all over the file: bytes changed, pieces left out or put in."""
    data, chance = file.read_bytes(), random.Random(7)
    for _ in range(400):
        at, length = chance.randrange(len(data)), chance.choice([1, 1, 1, 8])
        new = chance.choice([b"", chance.randbytes(length), chance.randbytes(2 * length)])
        file.write_bytes(data[:at] + new + data[at + length :])
        with contextlib.suppress(CheckpointError):
            read_header(file)


def archive(file: Path, table: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("archive/data.pkl", table)
    return file


class Runs:
    """A pickle that runs a command when it is opened."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch opened",)


def test_headers_of_a_pickle_that_would_run_something_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = archive(tmp_path / "pytorch_model.bin", pickle.dumps({"weight": Runs()}))
    with pytest.raises(CheckpointError, match="system, which is not allowed"):
        read_header(file)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("content", [[1], "text", 5])
def test_headers_of_a_pickle_without_a_table_are_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match="does not hold a table of tensors"):
        read_header(archive(tmp_path / "pytorch_model.bin", pickle.dumps(content)))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        pytest.param({"shape": [2, 2]}, "does not fit its shape", id="larger"),
        pytest.param({"shape": [-1, -1]}, "shape", id="negative"),
        pytest.param({"dtype": "Q3"}, "tensors of type Q3", id="type"),
        pytest.param({"data_offsets": [4, 8]}, "does not fit its shape", id="gap"),
        pytest.param({"data_offsets": None}, "is broken", id="no-place"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(
    tmp_path: Path, entry: dict[str, object], words: str
) -> None:
    table = {"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}
    text = json.dumps(table).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match=words):
        read_header(file)
