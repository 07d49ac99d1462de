"""LLaVA's own checkpoints: every layout gives the logits that the original's arithmetic gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.originals import (
    SQUARE,
    TALL,
    WIDE,
    close,
    expected_logits,
    first_logits,
    load,
    original_ids,
    pixels,
)
from tests.original import (
    ANYRES,
    Original,
    OriginalReference,
    make_original,
    num_pieces,
    write_json,
    write_weights,
)
from vlmchat.config import ModelConfig
from vlmchat.conversation import Conversation, Image
from vlmchat.engine.engine import Engine
from vlmchat.engine.loader import LoadedModel
from vlmchat.request import SamplingParams


@pytest.mark.parametrize("weights", ["safetensors", "bin", "shards"])
def test_whole_checkpoint_gives_the_originals_logits(tmp_path: Path, weights: str) -> None:
    made = make_original(tmp_path / "01", weights=weights)
    loaded = load(made.directory)
    close(first_logits(loaded), expected_logits(made, loaded))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mm_projector_type": "linear"}, id="linear"),
        pytest.param({"mm_projector_type": ...}, id="no-type-is-linear"),
        pytest.param({"mm_projector_type": "mlp3x_gelu"}, id="three-layers"),
        pytest.param({"mm_projector_type": "mlp1x_gelu"}, id="one-layer"),
        pytest.param({"mm_vision_select_layer": -1}, id="last-layer"),
        pytest.param({"mm_vision_select_feature": "cls_patch"}, id="class-token"),
        pytest.param({"image_aspect_ratio": ...}, id="crop"),
        pytest.param({"model_type": "llava_llama"}, id="newer-type"),
        pytest.param({"model_type": "llava_mistral"}, id="mistral"),
        pytest.param({"model_type": "llava_mistral", "sliding_window": 8}, id="mistral-window"),
        pytest.param({"rope_theta": 500.0, "rms_norm_eps": 1e-3}, id="rope-and-norm"),
        pytest.param({"rope_scaling": {"type": "linear", "factor": 2.0}}, id="rope-scaling"),
    ],
)
def test_settings_of_the_config_count(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = make_original(tmp_path / "01", **changes)
    loaded = load(made.directory)
    close(first_logits(loaded), expected_logits(made, loaded))


def joined(made: Original, loaded: LoadedModel, image: Image, tiles: Tensor) -> Tensor:
    """The features of one picture in tiles, told feature by feature."""
    base, cut = tiles[0], tiles[1:]
    merge = made.config.get("mm_patch_merge_type", "flat")
    if merge == "flat":
        return torch.cat(list(tiles))
    columns, rows = {SQUARE: (2, 2), WIDE: (3, 1), TALL: (1, 2)}[image]
    assert len(cut) == columns * rows
    lines = [
        [cut[y // 2 * columns + x // 2][y % 2 * 2 + x % 2] for x in range(2 * columns)]
        for y in range(2 * rows)
    ]
    if merge == "spatial":
        return torch.cat([base, *(torch.stack(line) for line in lines)])
    wide, high = 2 * columns, 2 * rows
    if image.width / image.height > wide / high:
        gone = (high - int(image.height * wide / image.width)) // 2
        lines = lines[gone : high - gone]
    else:
        gone = (wide - int(image.width * high / image.height)) // 2
        lines = [line[gone : wide - gone] for line in lines]
    newline = made.tensors["model.image_newline"]
    return torch.cat([base, *(torch.stack([*line, newline]) for line in lines)])


@pytest.mark.parametrize("merge", ["spatial_unpad", "spatial", "flat", ...])
def test_anyres_joins_tiles_as_the_original(tmp_path: Path, merge: Any) -> None:
    made = make_original(tmp_path / "01", **(ANYRES | {"mm_patch_merge_type": merge}))
    loaded = load(made.directory)
    reference = OriginalReference(made.config, made.tensors, made.tower)
    features = [
        joined(made, loaded, image, reference.features(pixels(loaded, image)))
        for image in (SQUARE, WIDE, TALL)
    ]
    close(first_logits(loaded), reference.logits(original_ids(loaded), features))


def test_anyres_takes_its_pinpoints_as_a_text_too(tmp_path: Path) -> None:
    grids = str(ANYRES["image_grid_pinpoints"])
    made = make_original(tmp_path / "01", **(ANYRES | {"image_grid_pinpoints": grids}))
    plain = make_original(tmp_path / "02", **ANYRES)
    assert torch.equal(first_logits(load(made.directory)), first_logits(load(plain.directory)))


def with_own_tower(made: Original, **changes: Any) -> Original:
    """The same checkpoint with other tower weights inside."""
    name = "model.vision_tower.vision_tower."
    own = {name + key: tensor * 1.5 for key, tensor in made.tower.items()}
    write_weights(made.directory, made.tensors | own)
    write_json(made.directory / "config.json", **(made.config | changes))
    return made


def test_frozen_tower_comes_from_its_own_repository(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01")
    plain = first_logits(load(made.directory))
    with_own_tower(made)
    assert torch.equal(first_logits(load(made.directory)), plain)


def test_unfrozen_tower_comes_from_the_checkpoint(tmp_path: Path) -> None:
    made = with_own_tower(make_original(tmp_path / "01"), unfreeze_mm_vision_tower=True)
    (Path(made.config["mm_vision_tower"]) / "pytorch_model.bin").unlink()  # not even looked at
    loaded = load(made.directory)
    own = {name: tensor * 1.5 for name, tensor in made.tower.items()}
    reference = replace(made, tower=own)
    close(first_logits(loaded), expected_logits(reference, loaded))


def test_unfrozen_tower_that_is_not_inside_comes_from_its_repository(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01", unfreeze_mm_vision_tower=True)
    loaded = load(made.directory)
    close(first_logits(loaded), expected_logits(made, loaded))


@pytest.mark.parametrize("beside", ["working directory", "checkpoint"])
def test_tower_is_found_by_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    made = make_original(tmp_path / "01")
    home = made.directory if beside == "checkpoint" else tmp_path / "work"
    home.mkdir(exist_ok=True)
    Path(made.config["mm_vision_tower"]).rename(home / "tower")
    write_json(made.directory / "config.json", **(made.config | {"mm_vision_tower": "tower"}))
    monkeypatch.chdir(home if beside == "working directory" else tmp_path)
    assert load(made.directory).model.dtype is torch.float32


@pytest.mark.parametrize("surplus", [0, 5])
def test_embeddings_are_cut_to_the_tokenizer(tmp_path: Path, surplus: int) -> None:
    made = make_original(tmp_path / "01", rows=num_pieces() + surplus)
    assert first_logits(load(made.directory)).shape == (num_pieces(),)


def test_a_missing_mm_use_im_patch_token_adds_a_token(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01", mm_use_im_patch_token=...)
    logits = first_logits(load(made.directory))
    assert logits.shape == (num_pieces() + 1,)
    expected = first_logits(load(make_original(tmp_path / "02").directory))
    close(logits[:-1], expected)
    close(logits[-1], expected.mean())  # so it is never the likeliest


def test_pictures_stand_between_marks_where_the_config_wants_it(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01", mm_use_im_start_end=True, rows=num_pieces() + 2)
    loaded = load(made.directory)
    ids = original_ids(loaded)
    places = [place for place, token in enumerate(ids) if token == -200]
    assert [(ids[p - 1], ids[p + 1]) for p in places] == [(num_pieces(), num_pieces() + 1)] * 3
    close(first_logits(loaded), expected_logits(made, loaded))


def test_context_is_cut_where_the_original_cuts_prompts(tmp_path: Path) -> None:
    made = make_original(tmp_path / "01", tokenizer_model_max_length=300)
    assert load(made.directory).status.context_length == 300


def test_answers_are_the_originals_greedy_tokens_over_two_turns(tmp_path: Path) -> None:
    """From question to text and back into the next prompt, through the engine."""
    made = make_original(tmp_path / "01")
    config = ModelConfig(str(made.directory), device="cpu", dtype="float32")
    loaded = load(made.directory)
    reference = OriginalReference(made.config, made.tensors, made.tower)
    engine = Engine.load(config)
    conversation = Conversation()
    for question, images in (("what is it", (WIDE,)), ("and this", (TALL,))):
        conversation = conversation.ask(question, images)
        features = [reference.features(pixels(loaded, i))[0] for i in conversation.images]
        ids = original_ids(loaded, conversation)
        expected: list[int] = []
        while len(expected) < 8 and 2 not in expected:
            expected.append(int(reference.logits(ids + expected, features).argmax()))
        params = SamplingParams(temperature=0, max_new_tokens=8)
        answer = "".join(delta.text for delta in engine.stream(conversation, params))
        backend = loaded.processor.tokenizer.backend_tokenizer
        assert answer == backend.decode(expected, skip_special_tokens=True).lstrip()
        conversation = conversation.answered(answer)
    engine.close()


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_original_checkpoint_runs_quantised(tmp_path: Path, quantization: str) -> None:
    made = make_original(tmp_path / "01")
    loaded = load(made.directory, quantization=quantization)
    layer = loaded.model.model.language_model.layers[0].mlp.up_proj
    assert layer.weight.dtype is {"8bit": torch.int8, "4bit": torch.uint8}[quantization]
    assert type(loaded.model.model.multi_modal_projector[0]) is torch.nn.Linear
    exact, rough = expected_logits(made, loaded), first_logits(loaded)
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.7
