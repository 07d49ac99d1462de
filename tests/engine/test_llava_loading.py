"""Original checkpoints that cannot be run have one clear line; loading keeps to its memory."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.originals import load
from tests.original import (
    ANYRES,
    Original,
    make_base,
    make_original,
    num_pieces,
    write_json,
    write_weights,
)
from vlmchat.config import ModelConfig
from vlmchat.engine.loader import load_model
from vlmchat.engine.templates import template_for_checkpoint
from vlmchat.errors import CheckpointError, ModelNotFound, UnsupportedModel, VlmchatError


def load_error(directory: Path, **options: Any) -> VlmchatError:
    with pytest.raises(VlmchatError) as caught:
        load(directory, **options)
    assert "\n" not in caught.value.message
    return caught.value


def changed(made: Original, tensors: dict[str, torch.Tensor]) -> Path:
    write_weights(made.directory, tensors)
    return made.directory


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({"model_type": "llava_mpt"}, "MPT", id="mpt"),
        pytest.param({"architectures": ["LlavaMPTForCausalLM"]}, "MPT", id="mpt-class"),
        pytest.param(
            {"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"]},
            "llava_qwen",
            id="other-language-model",
        ),
        pytest.param({"mm_vision_tower": ...}, "no vision tower", id="no-tower"),
        pytest.param({"s2": True}, "several scales", id="s2"),
        pytest.param({"mm_resampler_type": "perceiver"}, "perceiver", id="resampler"),
        pytest.param({"image_aspect_ratio": "anyres_max_9"}, "anyres_max_9", id="newer-anyres"),
        pytest.param({"quantization_config": {"bits": 4}}, "stored quantised", id="quantised"),
        pytest.param({"mm_projector_type": "ldp"}, "'ldp'", id="projector"),
    ],
)
def test_config_of_another_kind_is_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    made = make_original(tmp_path / "01")
    config = {k: v for k, v in (made.config | changes).items() if v is not ...}
    write_json(made.directory / "config.json", **config)
    error = load_error(made.directory)
    assert isinstance(error, UnsupportedModel)
    assert told in error.message


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"hidden_size": "many"}, id="text-for-a-number"),
        pytest.param({"num_attention_heads": 7}, id="heads-that-do-not-divide"),
        pytest.param({"hidden_act": "nope"}, id="unknown-activation"),
        pytest.param({"rope_scaling": {"type": "what"}}, id="unknown-rotary-scaling"),
        pytest.param({"mm_vision_select_layer": -99}, id="layer-that-is-not-there"),
        pytest.param({"mm_vision_select_layer": None}, id="no-layer"),
        pytest.param({"mm_vision_select_feature": "x"}, id="unknown-feature"),
        pytest.param({**ANYRES, "image_grid_pinpoints": "[[1,"}, id="broken-pinpoints"),
        pytest.param({**ANYRES, "image_grid_pinpoints": [[30, 28]]}, id="uneven-pinpoints"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = make_original(tmp_path / "01")
    write_json(made.directory / "config.json", **(made.config | changes))
    assert isinstance(load_error(made.directory), CheckpointError)


def test_text_model_is_refused_with_what_it_may_serve_for(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    error = load_error(tmp_path / "base")
    assert isinstance(error, UnsupportedModel)
    assert "text model" in error.message
    assert "--model-base" in error.message


@pytest.mark.parametrize("spread", [0.0, 0.001])
def test_delta_weights_are_refused(tmp_path: Path, spread: float) -> None:
    made = make_original(tmp_path / "01")
    delta = {name: t if "mm_" in name else t * spread for name, t in made.tensors.items()}
    delta |= {name: (t - 1) * spread for name, t in made.tensors.items() if "norm" in name}
    error = load_error(changed(made, delta))
    assert isinstance(error, UnsupportedModel)
    assert "apply_delta" in error.message


def test_missing_and_stray_tensors_are_named(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01")
    name = "model.layers.1.mlp.up_proj.weight"
    missing = {key: tensor for key, tensor in made.tensors.items() if key != name}
    assert "layers.1.mlp.up_proj.weight" in load_error(changed(made, missing)).message
    stray = made.tensors | {"model.stranger": torch.zeros(1)}
    assert "model.stranger" in load_error(changed(made, stray)).message
    bent = made.tensors | {name: torch.zeros(3, 64)}
    assert "[3, 64] in place of [96, 64]" in load_error(changed(made, bent)).message


def test_missing_shard_is_named(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01", weights="shards")
    (made.directory / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin" in load_error(made.directory).message


def test_missing_shards_are_named_where_a_projector_lies_beside_them(tmp_path: Path) -> None:
    """As in the released LLaVA-1.5: not to be taken for a checkpoint of a projector only."""
    made = make_original(tmp_path / "01", weights="shards")
    (made.directory / "mm_projector.bin").write_bytes(b"")
    for shard in made.directory.glob("pytorch_model-*.bin"):
        shard.unlink()
    assert "pytorch_model-00001" in load_error(made.directory).message


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import builtins; builtins.sprung = True",))


def test_pickle_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01", weights="bin")
    torch.save(made.tensors | {"trap": Trap()}, made.directory / "pytorch_model.bin")
    error = load_error(made.directory)
    assert isinstance(error, CheckpointError)
    assert "safetensors" in error.message
    assert not hasattr(sys.modules["builtins"], "sprung")


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"a": 1}, 2)])
def test_broken_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    made = make_original(tmp_path / "01", weights="bin")
    (made.directory / "pytorch_model.bin").write_bytes(content)
    error = load_error(made.directory)
    assert isinstance(error, CheckpointError)
    assert "pytorch_model.bin" in error.message


def test_files_of_older_torch_are_read(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01", weights="bin")
    file = made.directory / "pytorch_model.bin"
    torch.save(made.tensors, file, _use_new_zipfile_serialization=False)
    assert load(made.directory).model.dtype is torch.float32


def test_tower_that_is_not_there_is_named(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01")
    config = made.config | {"mm_vision_tower": "./no/such/tower"}
    write_json(made.directory / "config.json", **config)
    error = load_error(made.directory)
    assert isinstance(error, ModelNotFound)
    assert "./no/such/tower" in error.message


def test_tower_without_weights_is_named(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01")
    tower = Path(made.config["mm_vision_tower"])
    (tower / "pytorch_model.bin").unlink()
    assert str(tower) in load_error(made.directory).message


def test_tower_that_is_no_clip_is_refused(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01")
    write_json(Path(made.config["mm_vision_tower"]) / "config.json", model_type="siglip")
    error = load_error(made.directory)
    assert isinstance(error, UnsupportedModel)
    assert "siglip" in error.message


def test_progress_tells_every_hundredth_of_the_tensors(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01")
    stages: list[str] = []
    load_model(ModelConfig(str(made.directory), device="cpu", dtype="float32"), stages.append)
    counts = [int(s.split()[-2].split("/")[0]) for s in stages if s.endswith("tensors")]
    assert counts == sorted(counts)
    assert counts[-1] == int(stages[-1].split("/")[-1].split()[0])


@pytest.mark.parametrize(
    ("config", "tokenizer", "name", "found"),
    [
        pytest.param({"model_type": "llava_mistral"}, {}, "01", "mistral_instruct", id="mistral"),
        pytest.param(
            {}, {"added_tokens_decoder": {"7": "<|im_start|>"}}, "01", "chatml_direct", id="yi"
        ),
        pytest.param({"mm_projector_type": "mlp2x_gelu"}, {}, "01", "llava_v1", id="projector"),
        pytest.param(
            {"mm_projector_type": "mlp2x_gelu"}, {}, "not-mistral-prompted", "llava_v1", id="llama"
        ),
        pytest.param(
            {"mm_projector_type": "mlp2x_gelu"}, {}, "v1.6-34b", "chatml_direct", id="34b"
        ),
        pytest.param({}, {}, "llava-llama-2-13b", "llava_llama_2", id="by-name"),
        pytest.param({}, {}, "LLaVA-7B-v0", "llava_v0", id="by-nothing"),
    ],
)
def test_template_is_told_by_the_config_and_by_the_name_last(
    tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any], name: str, found: str
) -> None:
    write_json(tmp_path / "tokenizer_config.json", **tokenizer)
    assert template_for_checkpoint(tmp_path, config, name)[0] == found


def test_template_that_was_guessed_is_said_aloud(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01")
    stages: list[str] = []
    loaded = load_model(ModelConfig(str(made.directory), device="cpu"), stages.append)
    assert ("template", "llava_v1") in loaded.status.details
    assert (
        "prompt format by",
        "the projector of LLaVA-1.5 in config.json",
    ) in loaded.status.details
    assert any("llava_v1" in stage and "--conv-mode" in stage for stage in stages)
    assert not any(stage.startswith("note: ") for stage in stages)


def test_template_by_name_and_settings_that_are_not_applied_are_notes(tmp_path: Path) -> None:
    made = make_original(tmp_path / "llava-llama-2")
    write_json(made.directory / "generation_config.json", eos_token_id=2, no_repeat_ngram_size=3)
    stages: list[str] = []
    loaded = load_model(ModelConfig(str(made.directory), device="cpu"), stages.append)
    notes = [stage for stage in stages if stage.startswith("note: ")]
    assert ["llava_llama_2" in notes[0], "'llama-2' in the name" in notes[0]] == [True, True]
    assert notes[1:] == ["note: no_repeat_ngram_size 3 in generation_config.json is not applied"]
    assert ("not applied", "no_repeat_ngram_size 3") in loaded.status.details


MEASURE = """
import json, sys, threading, time
import torch
from vlmchat.config import ModelConfig
from vlmchat.engine.loader import load_model
import vlmchat.engine.llava_checkpoint, vlmchat.engine.quantize

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def watch():
    while True:
        seen.append(resident())
        time.sleep(0.001)

torch.set_num_threads(1)
start, seen = resident(), []
threading.Thread(target=watch, daemon=True).start()
config = ModelConfig(sys.argv[1], device="cpu", dtype="bfloat16", quantization=sys.argv[2] or None)
load_model(config, lambda stage: None)
print(json.dumps(max(seen) - start))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("quantization", "share"), [("", 1.3), ("4bit", 0.75), ("8bit", 0.9)])
def test_loading_takes_the_final_weights_and_one_shard(
    tmp_path: Path, quantization: str, share: float
) -> None:
    """So a model that is quantised never exists in 16 bits as a whole.

    share: of the files' bytes, with room for what each layer takes while it is quantised.
    """
    wide, layers = 1024, 10
    sizes = {"hidden_size": wide, "intermediate_size": 4 * wide, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    made = make_original(tmp_path / "01")
    write_json(made.directory / "config.json", **(made.config | sizes | heads))
    total = write_large(made.directory, wide, layers)
    command = [sys.executable, "-c", MEASURE, str(made.directory), quantization]
    peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert peak < share * total


def write_large(directory: Path, wide: int, layers: int) -> int:
    """Shards of random float16 weights, a layer each; bytes of all."""
    (directory / "model.safetensors").unlink()
    rows, sizes = num_pieces(), []
    index: dict[str, str] = {}
    rest = {"model.embed_tokens": (rows, wide), "lm_head": (rows, wide), "model.norm": (wide,)}
    rest |= {"model.mm_projector.0": (wide, 32), "model.mm_projector.2": (wide, wide)}
    shards = [{f"{name}.weight": shape for name, shape in rest.items()}]
    shards[0] |= {"model.mm_projector.0.bias": (wide,), "model.mm_projector.2.bias": (wide,)}
    for layer in range(layers):
        names = [f"self_attn.{n}_proj" for n in "qkvo"]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (wide, wide))
        shapes |= {"mlp.gate_proj": (4 * wide, wide), "mlp.up_proj": (4 * wide, wide)}
        shapes |= {"mlp.down_proj": (wide, 4 * wide), "input_layernorm": (wide,)}
        shapes |= {"post_attention_layernorm": (wide,)}
        shards.append({f"model.layers.{layer}.{n}.weight": s for n, s in shapes.items()})
    for number, shard in enumerate(shards):
        file = f"pytorch_model-{number + 1:05}-of-{len(shards):05}.bin"
        torch.save({n: torch.randn(s).half() for n, s in shard.items()}, directory / file)
        index |= dict.fromkeys(shard, file)
        sizes.append((directory / file).stat().st_size)
    write_json(directory / "pytorch_model.bin.index.json", metadata={}, weight_map=index)
    return sum(sizes)
