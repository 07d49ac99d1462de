"""PEFT adapters: every layer finds its weight and is merged; what is no LoRA is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from tests.families import MAKERS, make_family
from tests.pictures import noise_image
from tests.tiny import make_tiny_llava
from vlmchat.config import ModelConfig
from vlmchat.conversation import Conversation
from vlmchat.engine.adapters import _bare, base_of, read_adapter
from vlmchat.engine.engine import Engine
from vlmchat.errors import CheckpointError, UnsupportedModel
from vlmchat.request import SamplingParams

TEXT, TOWER = "language_model", "vision_tower"
# The model's own name -> the adapter's, as PEFT writes it over transformers 5, 4.52 and earlier.
LAYERS = {
    f"model.{TEXT}.layers.0.self_attn.q_proj": f"model.{TEXT}.layers.0.self_attn.q_proj",
    f"model.{TEXT}.layers.1.mlp.down_proj": f"{TEXT}.model.layers.1.mlp.down_proj",
    "model.multi_modal_projector.linear_1": "multi_modal_projector.linear_1",
    f"model.{TOWER}.encoder.layers.0.mlp.fc1": f"{TOWER}.vision_model.encoder.layers.0.mlp.fc1",
    "lm_head": f"{TEXT}.lm_head",
}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    directory = make_tiny_llava(tmp_path_factory.mktemp("base"))
    model = AutoModelForImageTextToText.from_pretrained(directory)
    return {name: weight.detach() for name, weight in model.state_dict().items()}


def write_adapter(directory: Path, base: Weights, rank: int = 3, **settings: Any) -> Weights:
    """An adapter in PEFT's format on LAYERS; its tensors."""
    torch.manual_seed(1)
    tensors = {}
    for own, name in LAYERS.items():
        rows, columns = base[f"{own}.weight"].shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "use_rslora": False, **settings}
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        pytest.param({}, 2.0, id="alpha-over-rank"),
        pytest.param({"use_rslora": True}, 6 / 3**0.5, id="alpha-over-root-of-rank"),
        pytest.param(
            {"alpha_pattern": {"lm_head|.*_proj|mlp.fc1|linear_1": 9, "fc1": 1}},
            3.0,
            id="alpha-by-layer",
        ),
    ],
)
def test_adapter_layers_are_added_to_their_weights_and_to_no_others(
    tmp_path: Path, base: Weights, settings: dict[str, Any], scale: float
) -> None:
    tensors = write_adapter(tmp_path, base, **settings)
    lora = read_adapter(tmp_path, base)
    for name, weight in base.items():
        expected = weight
        if layer := LAYERS.get(name.removesuffix(".weight")):
            stem = f"base_model.model.{layer}.lora"
            change = tensors[f"{stem}_B.weight"] @ tensors[f"{stem}_A.weight"]
            expected = weight + scale * change
        torch.testing.assert_close(lora.merge(name, weight), expected)
    lora.check_used()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"peft_type": "IA3"}, id="IA3"),
        pytest.param({"use_dora": True}, id="use_dora"),
        pytest.param({"alora_invocation_tokens": [1, 2]}, id="alora_invocation_tokens"),
        pytest.param({"init_lora_weights": "pissa_niter_4"}, id="pissa"),
    ],
)
def test_adapter_that_is_no_plain_lora_is_refused_by_what_it_is(
    tmp_path: Path, base: Weights, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    write_adapter(tmp_path, base, **settings)
    with pytest.raises(UnsupportedModel, match=request.node.callspec.id):
        read_adapter(tmp_path, base)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.language_model.lm_head.weight",
        "base_model.model.model.language_model.embed_tokens.lora_embedding_A",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    ],
)
def test_adapter_with_other_tensors_is_refused_by_their_names(
    tmp_path: Path, base: Weights, name: str
) -> None:
    tensors = write_adapter(tmp_path, base)
    save_file({**tensors, name: torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModel, match=name.rsplit(".", 2)[-2]):
        read_adapter(tmp_path, base)


def test_adapter_for_another_model_is_refused_by_the_layer_that_is_not_there(
    tmp_path: Path, base: Weights
) -> None:
    write_adapter(tmp_path, base)
    names = [name for name in base if "layers.1.mlp" not in name]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj"):
        read_adapter(tmp_path, names)


def test_adapter_names_its_base(tmp_path: Path, base: Weights) -> None:
    write_adapter(tmp_path, base, base_model_name_or_path="owner/name")
    assert base_of(tmp_path) == "owner/name"
    write_adapter(tmp_path, base, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="--model-base"):
        base_of(tmp_path)


@pytest.mark.parametrize("quantization", [None, "4bit"])
@pytest.mark.parametrize("named", [True, False], ids=["base-in-config", "base-as-option"])
def test_adapter_answers_as_the_model_that_it_was_merged_into(
    tmp_path: Path, named: bool, quantization: str | None
) -> None:
    base = make_tiny_llava(tmp_path / "base")
    merged = make_tiny_llava(tmp_path / "merged")
    model = AutoModelForImageTextToText.from_pretrained(base)
    weights = model.state_dict()
    settings: dict[str, Any] = {"base_model_name_or_path": str(base)} if named else {}
    tensors = write_adapter(tmp_path / "adapter", weights, **settings)
    for own, layer in LAYERS.items():
        stem = f"base_model.model.{layer}.lora"
        weights[f"{own}.weight"] += 2 * tensors[f"{stem}_B.weight"] @ tensors[f"{stem}_A.weight"]
    model.save_pretrained(merged)
    option = None if named else str(base)
    assert answer(tmp_path / "adapter", option, quantization) == answer(merged, None, quantization)


def answer(directory: Path, base: str | None, quantization: str | None) -> list[int]:
    config = ModelConfig(str(directory), base=base, quantization=quantization, device="cpu")
    engine = Engine.load(config)
    question = Conversation().ask("what is it", (noise_image(1),))
    stream = engine.stream(question, SamplingParams(temperature=0, max_new_tokens=12))
    assert list(stream)[-1].usage is not None
    engine.close()
    assert stream.sequence is not None
    return stream.sequence.tokens


def test_adapter_on_a_base_in_llavas_own_layout_is_refused(tmp_path: Path, base: Weights) -> None:
    write_adapter(tmp_path / "adapter", base)
    (tmp_path / "base").mkdir()
    original = {"model_type": "llava", "mm_vision_tower": "owner/name"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(original))
    config = ModelConfig(str(tmp_path / "adapter"), base=str(tmp_path / "base"), device="cpu")
    with pytest.raises(UnsupportedModel, match="Hugging Face layout"):
        Engine.load(config)


@pytest.mark.parametrize("family", MAKERS)
def test_adapter_names_are_told_apart_in_every_family(family: str, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(make_family(family, tmp_path / "model"))
    names = list(model.state_dict())
    assert len({_bare(name) for name in names}) == len(names)
