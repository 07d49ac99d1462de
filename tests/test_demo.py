"""The shipped model through the shipped program: what `make demo` and the README promise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import settings

from tests.engine.reference import Reference
from tests.engine.test_exactness import run
from tests.original import write_as_original
from tools.demo.draw_examples import EXAMPLES
from vlmchat.config import DEMO_MODEL, ImagePolicy, ModelConfig
from vlmchat.engine.engine import Engine
from vlmchat.engine.hub import find_checkpoint
from vlmchat.images import ImageLoader
from vlmchat.request import SamplingParams
from vlmchat.session import ChatSession

ROOT = Path(__file__).parents[1]
SHAPES = "examples/shapes.png"
MAX_MODEL_BYTES = 12_000_000


def demo_directory() -> Path:
    return find_checkpoint(DEMO_MODEL, None, lambda stage: None)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.load(ModelConfig(DEMO_MODEL, device="cpu"))
    yield engine
    engine.close()


def answers(engine: Engine, picture: str, *questions: str) -> list[str]:
    session = ChatSession(engine, SamplingParams(temperature=0, max_new_tokens=200))
    session.attach(ImageLoader(ImagePolicy()).load(str(ROOT / picture)))
    for question in questions:
        with session.ask(question) as reply:
            list(reply)
    return [turn.answer for turn in session.conversation.turns]


def chat(*arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "vlmchat", "chat", "--model-path", DEMO_MODEL, *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, timeout=120)


def test_demo_model_is_small_enough_to_ship() -> None:
    size = sum(file.stat().st_size for file in demo_directory().glob("*.safetensors"))
    assert 0 < size <= MAX_MODEL_BYTES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example[0])
def test_demo_model_names_every_shape_of_the_examples(
    engine: Engine, example: tuple[str, int, float, object, tuple[tuple[str, ...], ...]]
) -> None:
    description = answers(engine, f"examples/{example[0]}", "Describe the image.")[0].lower()
    for size, color, shape, *_ in example[4]:
        assert f"{size} {color} {shape}" in description
    assert description.count(".") >= len(example[4])


def test_demo_model_answers_follow_ups(engine: Engine) -> None:
    color, place = answers(engine, SHAPES, "What colour is the star?", "And where is it?")
    assert "green" in color.lower()
    assert "top right" in place.lower()


def test_demo_model_says_what_it_is_when_asked_about_something_else(engine: Engine) -> None:
    (answer,) = answers(engine, SHAPES, "What is the capital of France?")
    assert "demo" in answer
    assert "--model-path" in answer


def test_demo_model_answers_in_four_bits() -> None:
    engine = Engine.load(ModelConfig(DEMO_MODEL, device="cpu", quantization="4bit"))
    assert "green" in answers(engine, SHAPES, "What colour is the star?")[0].lower()
    engine.close()


def test_demo_model_written_in_the_original_layout_answers_as_itself(tmp_path: Path) -> None:
    written = write_as_original(demo_directory(), tmp_path / "original")
    # Small and square, so that both ways of preparing a picture leave it as it is.
    small = tmp_path / "small.png"
    PIL.Image.open(ROOT / "examples/star.png").convert("RGB").resize((96, 96)).save(small)
    said = []
    for path in (str(demo_directory()), str(written)):
        engine = Engine.load(ModelConfig(path, device="cpu", conv_mode="llava_v1"))
        said.append(answers(engine, str(small), "Describe the image.", "What colour is it?"))
        engine.close()
    assert said[0] == said[1]
    assert "star" in said[0][0]


def test_demo_turns_compute_only_what_is_new(engine: Engine) -> None:
    session = ChatSession(engine, SamplingParams(temperature=0, max_new_tokens=100))
    session.attach(ImageLoader(ImagePolicy()).load(str(ROOT / SHAPES)))
    prompts, cached = [0], []
    for question in ("Describe the image.", "How many shapes are there?", "Where is the star?"):
        with session.ask(question) as reply:
            list(reply)
        assert reply.usage is not None
        cached.append(reply.usage.cached_tokens)
        prompts.append(reply.usage.prompt_tokens)
    # All of the last prompt and its answer but the final tokens, which only now have a next one.
    assert all(now >= before for now, before in zip(cached[1:], prompts[1:], strict=False))


def test_random_conversations_on_the_demo_model_equal_plain_generate() -> None:
    how = settings(max_examples=4, stateful_step_count=8)
    run(demo_directory(), 700, how)


def test_readme_question_is_answered_on_stdout_alone() -> None:
    done = chat("--image", SHAPES, "-p", "What colour is the star?")
    assert done.returncode == 0
    assert b"green" in done.stdout.lower()
    assert done.stdout.count(b"\n") == 1


def test_picture_from_stdin_gives_json_with_its_size_and_tokens() -> None:
    picture = (ROOT / SHAPES).read_bytes()
    done = chat("--image", "-", "-p", "Describe the image.", "--json", stdin=picture)
    answer = json.loads(done.stdout)
    reference = Reference(demo_directory())
    assert answer["images"][0]["width"] == 640
    assert answer["usage"]["image_tokens"] == reference.model.config.image_seq_length
    assert answer["finish_reason"] == "stop"
