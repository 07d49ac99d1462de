"""The processor's chat template only ever appends, and pictures are stretched to one size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from tools.demo.batching import BOS_ID, EOS_ID, IMAGE_ID, Encoder, train_tokenizer
from tools.demo.model import PATCHES, build_config, build_model, build_processor
from tools.demo.pool import SIDE, model_pixels
from tools.demo.samples import corpus

Message = dict[str, object]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> LlavaProcessor:
    folder: Path = tmp_path_factory.mktemp("processor")
    tokenizer = train_tokenizer(corpus(random.Random(0), 100))
    build_processor(tokenizer).save_pretrained(folder)
    build_config().save_pretrained(folder)
    loaded = AutoProcessor.from_pretrained(folder)
    assert isinstance(loaded, LlavaProcessor)
    return loaded


def user(text: str, images: int = 0) -> Message:
    parts: list[dict[str, str]] = [{"type": "image"}] * images
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def ids(processor: LlavaProcessor, messages: list[Message], images: int) -> list[int]:
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [Image.new("RGB", (80, 60))] * images or None
    found: list[int] = processor(text=[text], images=pictures)["input_ids"][0]
    return found


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("system", [False, True])
def test_next_prompt_starts_with_the_last_one_and_its_answer(
    processor: LlavaProcessor, images: int, system: bool
) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}] if system else []
    messages.append(user("Where is the circle?", images))
    before = ids(processor, messages, images)
    answer = "The circle is in the top left."
    generated = processor.tokenizer.encode(f" {answer}", add_special_tokens=False)
    messages += [{"role": "assistant", "content": answer}, user("And what colour is it?")]
    after = ids(processor, messages, images)
    assert after[: len(before) + len(generated) + 1] == [*before, *generated, EOS_ID]
    assert before.count(BOS_ID) == 1
    assert before.count(IMAGE_ID) == images * PATCHES


def test_plain_string_content_is_the_same_as_a_text_part(processor: LlavaProcessor) -> None:
    plain: list[Message] = [{"role": "user", "content": "Hello"}]
    assert ids(processor, plain, 0) == ids(processor, [user("Hello")], 0)


def test_training_tokens_are_those_of_the_processor(processor: LlavaProcessor) -> None:
    encoder = Encoder(processor.tokenizer.backend_tokenizer, "0")
    text = "USER: <image>\nWHERE'S the centre-left star?  ASSISTANT: It is here.</s>USER: And now?"
    expected = processor(text=[text], images=[Image.new("RGB", (9, 9))])["input_ids"][0]
    assert [BOS_ID, *encoder.tokens(text)] == expected


def test_pictures_are_stretched_as_in_training(processor: LlavaProcessor) -> None:
    picture = Image.effect_mandelbrot((300, 170), (-2, -1, 1, 1), 20).convert("RGB")
    pixels = processor.image_processor(picture, return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    expected = (model_pixels(picture) / 255 - 0.5) / 0.25
    assert abs(pixels[0].transpose(1, 2, 0) - expected).max() < 1e-5


def test_model_is_small_enough_to_ship() -> None:
    parameters = sum(weight.numel() for weight in build_model().parameters())
    assert parameters * 2 < 12_000_000  # kept in 16 bits
