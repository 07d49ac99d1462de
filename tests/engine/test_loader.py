"""Loading: every bad checkpoint and option has its own clear line; nothing stays random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.original import write_as_original
from tests.pictures import noise_image
from tests.tiny import make_tiny_llava
from vlmchat.config import QUANTIZATIONS, ModelConfig
from vlmchat.conversation import Conversation
from vlmchat.engine.engine import Engine
from vlmchat.engine.loader import load_model, pick_kind
from vlmchat.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFound,
    NetworkError,
    OutOfMemory,
    UnsupportedModel,
    VlmchatError,
)
from vlmchat.request import SamplingParams


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def load_error(config: ModelConfig) -> VlmchatError:
    with pytest.raises(VlmchatError) as caught:
        Engine.load(config)
    assert "\n" not in caught.value.message
    return caught.value


def answer(config: ModelConfig) -> str:
    engine = Engine.load(config)
    params = SamplingParams(temperature=0, max_new_tokens=8)
    conversation = Conversation().ask("what is it", (noise_image(1, 28, 28),))
    text = "".join(delta.text for delta in engine.stream(conversation, params))
    engine.close()
    return text


# The model's names -> those in files of older versions.
STYLES = {
    "transformers-4.3": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "transformers-4.52": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "transformers-5": {},
}


def rename_weights(directory: Path, style: str, *, form: str = "safetensors") -> None:
    model = AutoModelForImageTextToText.from_pretrained(directory)
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = next((old for old in STYLES[style] if name.startswith(old)), "")
        tensors[STYLES[style].get(old, "") + name.removeprefix(old)] = tensor.clone()
    (directory / "model.safetensors").unlink()
    if form == "safetensors":
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    else:
        torch.save(tensors, directory / "pytorch_model.bin")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("style", STYLES)
def test_weights_load_under_the_names_of_every_version(
    tiny: Path, copy: Path, style: str, form: str
) -> None:
    rename_weights(copy, style, form=form)
    config = ModelConfig(str(tiny), device="cpu")
    assert answer(replace(config, path=str(copy))) == answer(config)


def test_image_token_may_be_no_row_of_the_embeddings(tiny: Path, copy: Path) -> None:
    """An unpadded vocabulary: the tokenizer's `<image>` is the number after the last row."""
    rows = json.loads((copy / "config.json").read_text())["text_config"]["vocab_size"]
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] == "<image>":
            token["id"] = rows
    edit_config(copy, image_token_index=rows)
    (copy / "tokenizer.json").write_text(
        json.dumps(tokenizer).replace('"<image>": 2', '"<old>": 2')
    )
    config = ModelConfig(str(tiny), device="cpu")
    assert answer(replace(config, path=str(copy))) == answer(config)


def test_model_written_in_the_original_layout_answers_as_itself(tiny: Path, tmp_path: Path) -> None:
    config = ModelConfig(str(tiny), device="cpu", conv_mode="llava_v1")
    written = write_as_original(tiny, tmp_path / "original")
    assert answer(replace(config, path=str(written))) == answer(config)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantised_model_answers_on_a_cpu(tiny: Path, quantization: str) -> None:
    assert answer(ModelConfig(str(tiny), device="cpu", quantization=quantization))


@pytest.mark.parametrize(
    ("asked", "device", "kind"),
    [
        ("8bit", "cpu", "int8"),
        ("4bit", "cpu", "int4"),
        ("8bit", "cuda:0", "bnb-int8"),
        ("4bit", "cuda:0", "bnb-nf4"),
        ("bnb-nf4", "cpu", "bnb-nf4"),
        (None, "cpu", None),
    ],
)
def test_kind_of_quantisation_is_the_devices_unless_it_is_named(
    asked: str | None, device: str, kind: str | None
) -> None:
    assert pick_kind(asked, torch.device(device)) == kind


def test_packed_layers_are_refused_on_a_gpu() -> None:
    with pytest.raises(ConfigError, match="use bnb-nf4, or --device cpu"):
        pick_kind("int4", torch.device("cuda"))


@pytest.mark.parametrize("quantization", ["8bit", "4bit", "bnb-int8", "bnb-nf4"])
def test_quantised_model_keeps_all_other_weights_in_the_dtype(
    tiny: Path, quantization: str
) -> None:
    config = ModelConfig(str(tiny), device="cpu", dtype="bfloat16", quantization=quantization)
    model = load_model(config, lambda stage: None).model
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype is torch.float32


def test_conv_mode_replaces_the_checkpoints_template(tiny: Path) -> None:
    engine = Engine.load(ModelConfig(str(tiny), device="cpu", conv_mode="chatml_direct"))
    prompt = engine.render(Conversation().ask("what is it", (noise_image(1),)))
    assert prompt.startswith("<|im_start|>system\nAnswer the questions.")
    assert engine.count(Conversation().ask("<image>", (noise_image(1),))).image_tokens == 4
    engine.close()


def test_load_refuses_an_unknown_conv_mode(tiny: Path) -> None:
    error = load_error(ModelConfig(str(tiny), conv_mode="llava_v2"))
    assert isinstance(error, ConfigError)
    assert "llava_v1" in error.message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model_answers_in_each_dtype(tiny: Path, dtype: str) -> None:
    assert answer(ModelConfig(str(tiny), device="cpu", dtype=dtype))


def test_load_says_what_a_missing_directory_is() -> None:
    error = load_error(ModelConfig("./no/such/model"))
    assert isinstance(error, ModelNotFound)
    assert "./no/such/model" in error.message


def test_load_refuses_a_directory_without_a_config(tmp_path: Path) -> None:
    assert isinstance(load_error(ModelConfig(str(tmp_path))), ModelNotFound)


@pytest.mark.parametrize("path", ["", " "])
def test_load_refuses_an_empty_name(path: str) -> None:
    """It took the directory that it was started in."""
    assert "--model-path is empty" in load_error(ModelConfig(path)).message


def test_load_takes_the_home_of_an_unknown_user_for_a_missing_directory() -> None:
    """It was told as an internal error."""
    assert "no model at ~nosuchuser/m" in load_error(ModelConfig("~nosuchuser/m")).message


def test_load_refuses_a_file(copy: Path) -> None:
    error = load_error(ModelConfig(str(copy / "config.json")))
    assert "is a file" in error.message


def test_load_names_the_demo_model_when_there_is_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    error = load_error(ModelConfig("nobody/nothing"))
    assert isinstance(error, NetworkError)
    assert "--model-path demo" in error.message


def test_load_refuses_another_family(copy: Path) -> None:
    edit_config(copy, model_type="bert")
    assert isinstance(load_error(ModelConfig(str(copy))), UnsupportedModel)


def test_converted_checkpoint_that_keeps_keys_of_the_original_loads(tiny: Path, copy: Path) -> None:
    edit_config(copy, mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size=1024)
    config = ModelConfig(str(tiny), device="cpu")
    assert answer(replace(config, path=str(copy))) == answer(config)


def test_load_names_missing_tensors(copy: Path) -> None:
    name = "multi_modal_projector.linear_1.weight"
    edit_weights(copy, lambda tensors: tensors.pop(name))
    error = load_error(ModelConfig(str(copy)))
    assert isinstance(error, CheckpointError)
    assert "1 missing" in error.message
    assert "multi_modal_projector.linear_1.weight" in error.message


def test_load_names_unexpected_tensors(copy: Path) -> None:
    edit_weights(copy, lambda t: t.update(stranger=t["language_model.lm_head.weight"].clone()))
    assert "stranger" in load_error(ModelConfig(str(copy))).message


def test_load_refuses_misshapen_tensors(copy: Path) -> None:
    name = "language_model.lm_head.weight"
    edit_weights(copy, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    error = load_error(ModelConfig(str(copy)))
    assert isinstance(error, CheckpointError)
    assert "lm_head.weight" in error.message


def test_load_refuses_a_truncated_weight_file(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert isinstance(load_error(ModelConfig(str(copy))), CheckpointError)


def test_load_refuses_a_weight_file_that_is_cut_off_behind_its_header(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert isinstance(load_error(ModelConfig(str(copy))), CheckpointError)


def test_load_refuses_a_config_with_a_value_of_a_wrong_kind(copy: Path) -> None:
    edit_config(copy, image_token_index="<image>")
    assert isinstance(load_error(ModelConfig(str(copy))), CheckpointError)


def test_load_says_so_when_memory_runs_out_meanwhile(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14 GiB")

    monkeypatch.setattr("vlmchat.engine.assemble._place", place)
    assert isinstance(load_error(ModelConfig(str(tiny), device="cpu")), OutOfMemory)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_load_refuses_a_broken_config(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    assert isinstance(load_error(ModelConfig(str(copy))), CheckpointError)


def test_load_refuses_a_missing_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert isinstance(load_error(ModelConfig(str(copy))), CheckpointError)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", "cuda:x"])
def test_load_refuses_a_device_that_is_not_there(tiny: Path, device: str) -> None:
    error = load_error(ModelConfig(str(tiny), device=device))
    assert isinstance(error, ConfigError)
    assert device in error.message


def test_load_refuses_a_context_longer_than_the_model_takes(tiny: Path) -> None:
    error = load_error(ModelConfig(str(tiny), context_length=257))
    assert "256" in error.message


def test_load_refuses_a_model_larger_than_the_memory(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Memory", (), {"available": 500_000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    error = load_error(ModelConfig(str(tiny), device="cpu"))
    assert isinstance(error, OutOfMemory)
    assert "--load-" in error.message


@pytest.mark.parametrize("runner", ["eager", "auto"])
def test_answer_stays_when_the_weights_are_written_over(copy: Path, runner: str) -> None:
    edit_weights(copy, lambda w: w.update({name: t.bfloat16() for name, t in w.items()}))
    edit_config(copy, dtype="bfloat16")
    question = Conversation().ask("1 2 3", (noise_image(1, 40, 40),))
    params = SamplingParams(temperature=0, max_new_tokens=8)
    weights, answers = copy / "model.safetensors", []
    for written in (weights.read_bytes(), bytes(weights.stat().st_size)):
        with closing(Engine.load(ModelConfig(str(copy), device="cpu", runner=runner))) as engine:
            with weights.open("r+b") as file:
                file.write(written)
            answers.append([delta.text for delta in engine.stream(question, params)])
    assert answers[0] == answers[1]
    assert answers[0]
