"""Load an original checkpoint through the package; the logits it gives, and those to expect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.original import (
    Original,
    OriginalReference,
)
from tests.pictures import noise_image
from vlmchat.config import ModelConfig
from vlmchat.conversation import Conversation, Image
from vlmchat.engine.loader import LoadedModel, load_model
from vlmchat.engine.processor import Processor
from vlmchat.engine.runner import EagerRunner
from vlmchat.engine.vision import VisionCache

SQUARE, WIDE, TALL = noise_image(1, 40, 40), noise_image(2, 90, 31), noise_image(3, 20, 71)
ASKED = Conversation().ask("what is it", (SQUARE, WIDE)).answered("a red thing").ask("why", (TALL,))


def load(directory: Path, **options: Any) -> LoadedModel:
    options = {"device": "cpu", "dtype": "float32", "conv_mode": "llava_v1"} | options
    return load_model(ModelConfig(str(directory), **options), lambda stage: None)


def first_logits(loaded: LoadedModel, conversation: Conversation = ASKED) -> Tensor:
    prompt = Processor(loaded.processor, loaded.spec, loaded.template).encode(conversation)
    runner = EagerRunner(loaded.model, loaded.spec, VisionCache(loaded.model), 1)
    logits = runner.prefill(0, prompt, 0, len(prompt.ids))
    assert logits is not None
    return logits


def original_ids(loaded: LoadedModel, conversation: Conversation = ASKED) -> list[int]:
    """The prompt's ids in the original's form: one -200 for each picture."""
    prompt = Processor(loaded.processor, loaded.spec, loaded.template).encode(conversation)
    ids: list[int] = list(prompt.ids)
    for span in reversed(prompt.images):
        ids[span.start : span.stop] = [-200]
    return ids


def pixels(loaded: LoadedModel, image: Image) -> Tensor:
    return torch.from_numpy(loaded.processor([image.pixels], ["<image>"])["pixel_values"])


def expected_logits(
    made: Original, loaded: LoadedModel, images: Sequence[Image] = (SQUARE, WIDE, TALL)
) -> Tensor:
    reference = OriginalReference(made.config, made.tensors, made.tower)
    features = [reference.features(pixels(loaded, image))[0] for image in images]
    return reference.logits(original_ids(loaded), features)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
