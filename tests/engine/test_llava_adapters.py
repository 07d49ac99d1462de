"""LLaVA's LoRA and projector-only checkpoints on a base: the same as merged by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.originals import close, expected_logits, first_logits, load
from tests.original import (
    HIDDEN,
    Original,
    Tensors,
    make_base,
    make_original,
    maker,
    num_pieces,
    projector_tensors,
    write_json,
    write_tokenizer,
    write_weights,
)
from vlmchat.config import ModelConfig
from vlmchat.engine.engine import Engine
from vlmchat.engine.lora import bare_name
from vlmchat.errors import CheckpointError, ConfigError, ModelNotFound, VlmchatError

LAYERS = [
    f"model.layers.{layer}.{name}_proj"
    for layer in range(2)
    for name in ("self_attn.q", "self_attn.v", "mlp.down")
]


def only(made: Original, *kept: str) -> None:
    """Take everything out of the directory but its config and these files."""
    for file in made.directory.iterdir():
        if file.name not in ("config.json", *kept):
            file.unlink()


def make_lora(directory: Path, base: Tensors, *, form: str = "bin", **changes: Any) -> Original:
    """A LoRA of rank 4 as LLaVA writes it; `tensors` are those of the merged model."""
    made = make_original(directory, **changes)
    only(made)
    make, adapter, merged = maker(3), {}, dict(base)
    for layer in LAYERS:
        rows, columns = base[f"{layer}.weight"].shape
        a, b = make(4, columns), make(rows, 4)
        adapter[f"base_model.model.{layer}.lora_A.weight"] = a
        adapter[f"base_model.model.{layer}.lora_B.weight"] = b
        merged[f"{layer}.weight"] = base[f"{layer}.weight"] + 8 / 4 * b @ a
    if form == "bin":
        torch.save(adapter, directory / "adapter_model.bin")
    else:
        save_file(adapter, directory / "adapter_model.safetensors", {"format": "pt"})
    write_json(
        directory / "adapter_config.json",
        peft_type="LORA",
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
        r=4,
        lora_alpha=8,
        bias="none",
    )
    own = {name: t for name, t in made.tensors.items() if "mm_" in name or "newline" in name}
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in own.items()},
        directory / "non_lora_trainables.bin",
    )
    return Original(directory, made.config, merged | own, made.tower)


def make_projector(directory: Path, base: Tensors, rows: Tensors, **changes: Any) -> Original:
    """mm_projector.bin and config.json only, with `rows` of embeddings beside the projector."""
    made = make_original(directory, model_type="llava_llama", **changes)
    only(made)
    own = projector_tensors(made.config["mm_projector_type"], maker(4))
    torch.save(own | rows, directory / "mm_projector.bin")
    return Original(directory, made.config, base | own, made.tower)


def load_error(directory: Path, **options: Any) -> VlmchatError:
    with pytest.raises(VlmchatError) as caught:
        Engine.load(ModelConfig(str(directory), device="cpu", **options))
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_lora_on_a_text_model_is_the_merged_model(tmp_path: Path, form: str) -> None:
    made = make_lora(tmp_path / "01", make_base(tmp_path / "base"), form=form)
    loaded = load(made.directory, base=str(tmp_path / "base"))
    close(first_logits(loaded), expected_logits(made, loaded))


def test_merging_into_half_precision_files_rounds_nothing(tmp_path: Path) -> None:
    base = {name: tensor.half() for name, tensor in make_base(tmp_path / "base").items()}
    (index,) = (tmp_path / "base").glob("*.index.json")
    index.unlink()
    for shard in (tmp_path / "base").glob("*.bin"):
        shard.unlink()
    write_weights(tmp_path / "base", base)
    whole = {name: tensor.float() for name, tensor in base.items()}
    made = make_lora(tmp_path / "01", whole)
    loaded = load(made.directory, base=str(tmp_path / "base"))
    close(first_logits(loaded), expected_logits(made, loaded))


def test_lora_on_a_llava_replaces_its_projector(tmp_path: Path) -> None:
    base = make_original(tmp_path / "base", mm_projector_type="linear")
    made = make_lora(tmp_path / "01", base.tensors)
    loaded = load(made.directory, base=str(base.directory))
    close(first_logits(loaded), expected_logits(made, loaded))


def test_lora_finds_the_base_that_it_names(tmp_path: Path) -> None:
    made = make_lora(tmp_path / "01", make_base(tmp_path / "base"))
    write_json(
        made.directory / "adapter_config.json",
        **{"r": 4, "lora_alpha": 8, "base_model_name_or_path": str(tmp_path / "base")},
    )
    loaded = load(made.directory)
    close(first_logits(loaded), expected_logits(made, loaded))


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_lora_loads_quantised(tmp_path: Path, quantization: str) -> None:
    made = make_lora(tmp_path / "01", make_base(tmp_path / "base"))
    options = {"base": str(tmp_path / "base"), "quantization": quantization}
    loaded = load(made.directory, **options)
    rough, exact = first_logits(loaded), expected_logits(made, loaded)
    assert torch.nn.functional.cosine_similarity(rough, exact, dim=0) > 0.6


def test_template_is_told_by_the_tokenizer_of_the_base(tmp_path: Path) -> None:
    made = make_lora(tmp_path / "01", make_base(tmp_path / "base"))
    write_tokenizer(tmp_path / "base", chat_template="<|im_start|>{{ messages }}")
    loaded = load(made.directory, base=str(tmp_path / "base"), conv_mode=None)
    assert loaded.template is not None
    assert loaded.template.name == "chatml_direct"


@pytest.mark.parametrize("wrapping", ["", ".modules_to_save", ".modules_to_save.default"])
def test_wrappings_of_peft_are_taken_from_a_name(wrapping: str) -> None:
    assert bare_name(f"base_model.model.model.norm{wrapping}.weight") == "model.norm.weight"
    assert bare_name(f"base_model.model.lm_head{wrapping}.weight") == "lm_head.weight"


def test_lora_without_a_base_says_what_to_give(tmp_path: Path) -> None:
    made = make_lora(tmp_path / "01", make_base(tmp_path / "base"))
    error = load_error(made.directory)
    assert isinstance(error, ConfigError)
    assert "--model-base" in error.message


def test_lora_on_the_wrong_base_names_what_does_not_fit(tmp_path: Path) -> None:
    made = make_lora(tmp_path / "01", make_base(tmp_path / "base"))
    shapes = {name: torch.zeros(3, 3) for name in ["base_model.model.model.layers.7.mlp.up_proj"]}
    adapter = {f"{name}.lora_{factor}.weight": t for name, t in shapes.items() for factor in "AB"}
    torch.save(adapter, made.directory / "adapter_model.bin")
    error = load_error(made.directory, base=str(tmp_path / "base"))
    assert "model.layers.7.mlp.up_proj.weight" in error.message
    assert "--model-base" in error.message


def test_lora_without_its_projector_is_refused(tmp_path: Path) -> None:
    made = make_lora(tmp_path / "01", make_base(tmp_path / "base"))
    (made.directory / "non_lora_trainables.bin").unlink()
    error = load_error(made.directory, base=str(tmp_path / "base"))
    assert isinstance(error, CheckpointError)
    assert "non_lora_trainables.bin" in error.message


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_projector_on_a_base(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base")
    made = make_projector(tmp_path / "01", base, {}, mm_projector_type=kind)
    loaded = load(made.directory, base=str(tmp_path / "base"))
    close(first_logits(loaded), expected_logits(made, loaded))


@pytest.mark.parametrize("whole", [True, False])
def test_projector_brings_the_rows_of_its_marks(tmp_path: Path, whole: bool) -> None:
    """The whole table of embeddings, or only those of <im_start> and <im_end>."""
    base = make_base(tmp_path / "base")
    table, head = base["model.embed_tokens.weight"], base["lm_head.weight"]
    own = maker(6)(2, HIDDEN)
    full = torch.cat([table, own])
    rows = {"model.embed_tokens.weight": full if whole else own}
    made = make_projector(tmp_path / "01", base, rows, mm_use_im_start_end=True)
    merged = made.tensors | {
        "model.embed_tokens.weight": full,
        "lm_head.weight": torch.cat([head, head.mean(0).expand(2, -1)]),
    }
    loaded = load(made.directory, base=str(tmp_path / "base"))
    expected = expected_logits(Original(made.directory, made.config, merged, made.tower), loaded)
    assert expected.shape == (num_pieces() + 2,)
    close(first_logits(loaded), expected)


def test_projector_without_a_base_says_what_to_give(tmp_path: Path) -> None:
    made = make_projector(tmp_path / "01", {}, {}, _name_or_path="lmsys/vicuna-7b-v1.3")
    error = load_error(made.directory)
    assert isinstance(error, ConfigError)
    assert "--model-base" in error.message
    assert "lmsys/vicuna-7b-v1.3" in error.message


def test_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    made = make_projector(tmp_path / "01", {}, {})
    error = load_error(made.directory, base="./no/such/base")
    assert isinstance(error, ModelNotFound)
    assert "./no/such/base" in error.message


def test_base_that_a_lora_names_and_that_is_not_there_may_be_another(tmp_path: Path) -> None:
    made = make_lora(tmp_path / "01", make_base(tmp_path / "base"))
    named = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "/home/trainer/vicuna"}
    write_json(made.directory / "adapter_config.json", **named)
    error = load_error(made.directory)
    assert isinstance(error, ModelNotFound)
    assert "/home/trainer/vicuna" in error.message
    assert "--model-base" in error.message


def test_base_in_another_layout_is_refused(tmp_path: Path) -> None:
    made = make_projector(tmp_path / "01", make_base(tmp_path / "base"), {})
    (file,) = (tmp_path / "base").glob("*.index.json")
    for name in {*json.loads(file.read_text())["weight_map"].values(), file.name}:
        (tmp_path / "base" / name).unlink()
    torch.save({"language_model.x": torch.zeros(1)}, tmp_path / "base" / "pytorch_model.bin")
    error = load_error(made.directory, base=str(tmp_path / "base"))
    assert "model.embed_tokens.weight" in error.message


def test_base_for_a_whole_model_is_refused(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01")
    error = load_error(made.directory, base="lmsys/vicuna-7b-v1.5")
    assert isinstance(error, ConfigError)
