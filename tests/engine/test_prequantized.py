"""Checkpoints that are stored quantised load as what they stand for, and stay small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.test_loader import answer, edit_config, edit_weights, load_error
from tests.stored import WAYS, awq, gptq
from tests.tiny import make_tiny_llava
from vlmchat.config import ModelConfig
from vlmchat.engine.checkpoint import inspect
from vlmchat.engine.loader import load_model
from vlmchat.engine.packed import Int4Linear
from vlmchat.engine.prequantized import kept_kind
from vlmchat.engine.schemes import Scheme
from vlmchat.errors import CheckpointError, UnsupportedModel

LAYERS = "language_model.model.layers."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("tiny"))


def store(tiny: Path, directory: Path, way: str, *, shards: int = 1) -> tuple[Path, Path]:
    """Two copies of a model: stored in that way, and in float32 what it stands for."""
    settings, write, _ = WAYS[way]
    small, full = (Path(shutil.copytree(tiny, directory / name)) for name in ("small", "full"))
    stored: dict[str, torch.Tensor] = {}
    restored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tiny / "model.safetensors").items():
        if "layers." in name and name.endswith("_proj.weight") and "vision" not in name:
            parts, tensor = write(tensor)
            stored |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
        else:
            stored[name] = tensor
        restored[name] = tensor
    save_file(contiguous(restored), full / "model.safetensors", {"format": "pt"})
    write_shards(small, contiguous(stored), shards)
    edit_config(small, quantization_config=settings)
    return small, full


def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    """A module's parts go to different files."""
    (directory / "model.safetensors").unlink()
    names = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    for number, file in enumerate(names):
        some = dict(list(tensors.items())[number::count])
        save_file(some, directory / (file if count > 1 else "model.safetensors"), {"format": "pt"})
    if count > 1:
        where = {name: names[number % count] for number, name in enumerate(tensors)}
        index = {"metadata": {}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def weights(directory: Path, kind: str | None = None) -> tuple[Any, Any]:
    config = ModelConfig(str(directory), device="cpu", quantization=kind)
    layer = load_model(config, lambda stage: None).model.model.language_model.layers[1]
    return layer.self_attn.q_proj, layer.mlp.down_proj


@pytest.mark.parametrize("way", WAYS)
def test_stored_weights_are_restored_to_what_they_stand_for(
    tiny: Path, tmp_path: Path, way: str
) -> None:
    small, full = store(tiny, tmp_path, way)
    for found, expected in zip(weights(small), weights(full), strict=True):
        assert type(found).__name__ == WAYS[way][2]
        eye = torch.eye(*expected.weight.shape[1:])
        # bitsandbytes' product on a CPU rounds to bfloat16.
        tolerance = 1e-2 if WAYS[way][2] == "Linear4bit" else 1e-5
        torch.testing.assert_close(found(eye), expected(eye), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("way", ["gptq-desc-act", "awq", "packed-asymmetric", "bnb-int8"])
def test_stored_model_answers_as_its_full_weights(tiny: Path, tmp_path: Path, way: str) -> None:
    small, full = store(tiny, tmp_path, way, shards=3)
    assert answer(ModelConfig(str(small), device="cpu")) == answer(
        ModelConfig(str(full), device="cpu")
    )


@pytest.mark.parametrize("way", ["gptq", "whole-numbers", "bnb-nf4"])
def test_stored_weights_are_requantised_only_where_another_kind_is_asked_for(
    tiny: Path, tmp_path: Path, way: str
) -> None:
    small, _ = store(tiny, tmp_path, way)
    kept, _ = weights(small, "4bit")
    assert isinstance(kept, Int4Linear)
    stored, _ = weights(small)
    same = type(stored) is Int4Linear
    assert same == (way == "gptq")
    if same:
        torch.testing.assert_close(kept.weight, stored.weight, rtol=0, atol=0)


def test_layers_that_are_stored_whole_stay_whole(tiny: Path, tmp_path: Path) -> None:
    """`modules_to_not_convert` and its like: the tensors tell."""
    small, full = store(tiny, tmp_path, "gptq")
    name = f"{LAYERS}1.mlp.down_proj"
    whole = load_file(full / "model.safetensors")[f"{name}.weight"]

    def put_back(tensors: dict[str, torch.Tensor]) -> None:
        for end in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{name}.{end}"]
        tensors[f"{name}.weight"] = whole

    edit_weights(small, put_back)
    attention, down = weights(small)
    assert (type(attention).__name__, type(down).__name__) == ("Int4Linear", "Linear")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "hqq"}, "by hqq"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "in 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "all"}, "group_size 'all'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "other settings"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ("4 bits", "no object"),
    ],
)
def test_load_refuses_ways_to_store_that_are_not_served(
    tiny: Path, tmp_path: Path, settings: object, told: str
) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    edit_config(copy, quantization_config=settings)
    error = load_error(ModelConfig(str(copy), device="cpu"))
    assert isinstance(error, UnsupportedModel)
    assert "stored quantised" in error.message
    assert told in error.message


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_load_names_the_module_whose_parts_do_not_fit(
    tiny: Path, tmp_path: Path, part: str
) -> None:
    small, _ = store(tiny, tmp_path, "awq")
    edit_weights(small, lambda tensors: tensors.pop(f"{LAYERS}0.mlp.up_proj.{part}"))
    error = load_error(ModelConfig(str(small), device="cpu"))
    assert isinstance(error, CheckpointError)
    assert "layers.0.mlp.up_proj" in error.message


@pytest.mark.parametrize(
    ("scheme", "device", "kind"),
    [
        (Scheme("gptq", 4, 128), "cpu", "int4"),
        (Scheme("gptq", 8, 128), "cpu", None),
        (Scheme("gptq", 8, -1), "cpu", "int8"),
        (Scheme("awq", 4, 128), "cuda", None),
        (Scheme("bitsandbytes", 4), "cuda", "bnb-nf4"),
        (None, "cpu", None),
    ],
)
def test_memory_is_reckoned_by_the_layers_that_stored_weights_become(
    scheme: Scheme | None, device: str, kind: str | None
) -> None:
    assert kept_kind(scheme, torch.device(device)) == kind


@pytest.mark.parametrize("way", ["gptq", "awq", "packed", "whole-numbers", "blocks", "bnb-nf4"])
def test_stored_model_is_described_by_its_full_size(tiny: Path, tmp_path: Path, way: str) -> None:
    small, full = store(tiny, tmp_path, way)
    found, expected = inspect(small, "small"), inspect(full, "full")
    assert found.parameters == expected.parameters
    assert found.memory_bytes == expected.memory_bytes
    assert found.problem is None


@pytest.mark.parametrize("write", [awq, gptq])
def test_written_weights_are_near_those_they_were_made_from(write) -> None:  # type: ignore[no-untyped-def]
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    _, restored = write(weight)
    assert float((restored - weight).norm() / weight.norm()) < 0.12
