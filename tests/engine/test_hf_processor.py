"""A checkpoint's own processor, read from disk without torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoProcessor
from transformers.models.smolvlm import processing_smolvlm

from tests.families import MAKERS, make_family
from tests.pictures import noise_image
from tests.tiny import make_tiny_llava
from vlmchat.engine.hf_processor import read_processor
from vlmchat.errors import UnsupportedModel


def test_processor_equals_the_one_of_auto_processor(tmp_path: Path) -> None:
    directory = make_tiny_llava(tmp_path / "model")
    config = AutoConfig.from_pretrained(directory)
    ours, theirs = read_processor(directory, config), AutoProcessor.from_pretrained(directory)
    picture = noise_image(1).pixels
    a, b = (p(images=[picture], text=["<image>é"], return_tensors="np") for p in (ours, theirs))
    assert a["input_ids"].tolist() == b["input_ids"].tolist()
    assert (a["pixel_values"] == b["pixel_values"]).all()
    assert ours.chat_template == theirs.chat_template


def rewrite_as_of_2024(directory: Path) -> None:
    """The files that transformers 4 wrote: one for pictures, one for the template."""
    file = directory / "processor_config.json"
    settings = json.loads(file.read_text())
    pictures = settings.pop("image_processor")
    kind = pictures["image_processor_type"].removesuffix("Pil") + "Fast"
    pictures |= {"image_processor_type": kind, "processor_class": settings["processor_class"]}
    (directory / "preprocessor_config.json").write_text(json.dumps(pictures))
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        settings.pop(name, None)
    file.write_text(json.dumps(settings))
    template = directory / "chat_template.jinja"
    if template.is_file():
        text = json.dumps({"chat_template": template.read_text()})
        (directory / "chat_template.json").write_text(text)
        template.unlink()


@pytest.mark.parametrize("family", MAKERS)
def test_processor_in_older_files_is_the_same(family: str, tmp_path: Path) -> None:
    directory = make_family(family, tmp_path / "model")
    config = AutoConfig.from_pretrained(directory)
    newer = read_processor(directory, config)
    rewrite_as_of_2024(directory)
    older = read_processor(directory, config)
    inputs = {"images": [noise_image(1, 90, 30).pixels], "text": [f"{newer.image_token}a"]}
    a, b = newer(**inputs), older(**inputs)
    assert a["input_ids"] == b["input_ids"]
    assert (np.asarray(a["pixel_values"]) == np.asarray(b["pixel_values"])).all()
    assert older.chat_template == newer.chat_template


def test_processor_is_found_by_the_config_where_no_file_names_it(tmp_path: Path) -> None:
    directory = make_family("qwen2_vl", tmp_path / "model")
    for file in directory.glob("*config.json"):
        settings = json.loads(file.read_text())
        settings.pop("processor_class", None)
        file.write_text(json.dumps(settings))
    processor = read_processor(directory, AutoConfig.from_pretrained(directory))
    assert type(processor).__name__ == "Qwen2VLProcessor"


def test_processor_that_needs_a_missing_package_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_family("smolvlm", tmp_path / "model")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(UnsupportedModel, match="num2words"):
        read_processor(directory, AutoConfig.from_pretrained(directory))
