"""Each family: the ids of its own processor, and answers equal to plain `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.engine import test_exactness
from tests.engine.reference import Reference
from tests.families import CONTEXT_LENGTH, MAKERS, make_family
from tests.pictures import noise_image
from vlmchat.config import ModelConfig
from vlmchat.conversation import Conversation
from vlmchat.engine.engine import Engine
from vlmchat.engine.processor import Processor
from vlmchat.engine.runner import EagerRunner
from vlmchat.engine.sampler import Sampler
from vlmchat.engine.spec import read_spec
from vlmchat.engine.vision import VisionCache
from vlmchat.request import SamplingParams, Status

# PaliGemma's processor makes labels from torch tensors by way of numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
WIDE, TALL, SMALL = noise_image(1, 90, 30), noise_image(2, 33, 70), noise_image(3, 20, 20)
SIZES = [(90, 30), (33, 70), (20, 20), (60, 60)]
OTHER = noise_image(4, 90, 30)

ONE = Conversation().ask("what is it", (WIDE,))
TWO = ONE.answered("it is red").ask("and these\n\n", (TALL, SMALL))
THREE = TWO.answered("").ask("\nwhy is it blue")
SYSTEM = Conversation(system="be brief").ask("this", (SMALL, SMALL))
ANOTHER = Conversation().ask("what is it", (OTHER,))


class Family:
    """A tiny checkpoint in the engine, with its reference beside it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.reference = Reference(make_family(name, directory))
        model, hf_processor = self.reference.model, self.reference.processor
        spec = read_spec(model.config, model.generation_config, hf_processor)
        self.vision = VisionCache(model)
        self.processor = Processor(hf_processor, spec)
        self.engine = Engine(
            EagerRunner(model, spec, self.vision, num_slots=2),
            self.processor,
            Sampler(),
            spec.eos_token_ids,
            Status(name, CONTEXT_LENGTH),
            num_slots=2,
            vision=self.vision,
        )

    def check(self, *conversations: Conversation) -> list[int]:
        """Assert that answers, given at the same time, are the reference's.

        How many of each prompt's tokens came from earlier ones.
        """
        streams = [self.engine.stream(conversation, GREEDY) for conversation in conversations]
        for stream, conversation in zip(streams, conversations, strict=True):
            for _ in stream:
                pass
            assert stream.sequence is not None
            expected = self.reference.answer_ids(conversation, GREEDY.max_new_tokens)
            assert stream.sequence.tokens == expected
        return [stream.sequence.num_cached for stream in streams if stream.sequence]


@pytest.fixture(scope="module", params=list(MAKERS))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    family = Family(request.param, tmp_path_factory.mktemp(request.param) / "model")
    yield family
    family.engine.close()


@pytest.mark.parametrize("conversation", [ONE, THREE, SYSTEM], ids=["one", "three", "system"])
def test_family_ids_equal_those_of_its_own_processor(
    family: Family, conversation: Conversation
) -> None:
    expected = family.reference.inputs(conversation)["input_ids"][0].tolist()
    prompt = family.processor.encode(conversation)
    assert list(prompt.ids) == expected
    assert family.processor.count(conversation).image_tokens == prompt.num_image_tokens


def test_family_answers_as_plain_generate_and_encodes_each_picture_once(family: Family) -> None:
    encoded = family.vision.num_encoded
    reused = [family.check(turn)[0] for turn in (ONE, TWO, THREE)]
    # LLaVA-OneVision sees the first picture in another way once it is no longer alone.
    assert family.vision.num_encoded - encoded == (4 if family.name == "llava_onevision" else 3)
    if family.name == "paligemma":
        assert reused == [0, 0, 0]
    else:
        assert reused[2] >= family.processor.encode(TWO).images[-1].stop


def test_family_answers_as_plain_generate_after_other_conversations(family: Family) -> None:
    for conversation in (ANOTHER, TWO, TWO, ONE, SYSTEM):
        family.check(conversation)


def test_family_answers_two_conversations_at_once(family: Family) -> None:
    family.check(ANOTHER, THREE)
    family.check(SYSTEM, TWO)


def test_family_answers_without_a_picture(family: Family) -> None:
    if family.name == "paligemma":
        pytest.skip("its own processor takes no prompt without a picture")
    family.check(Conversation().ask("hello"))


def test_family_keeps_special_tokens_that_a_person_types_as_text(family: Family) -> None:
    token_ids = family.reference.processor.tokenizer.all_special_ids
    plain = family.processor.encode(Conversation().ask("a", (SMALL,)))
    typed = "".join(family.reference.processor.tokenizer.all_special_tokens)
    prompt = family.processor.encode(Conversation().ask(typed, (SMALL,)))
    assert [i for i in prompt.ids if i in token_ids] == [i for i in plain.ids if i in token_ids]


@pytest.mark.parametrize("quantization", [None, "4bit"])
def test_family_loads_from_disk_in_full_or_quantised(
    family: Family, quantization: str | None
) -> None:
    directory = family.reference.directory
    engine = Engine.load(ModelConfig(str(directory), device="cpu", quantization=quantization))
    stream = engine.stream(TWO, GREEDY)
    assert list(stream)[-1].usage is not None
    engine.close()
    assert stream.sequence is not None
    expected = family.reference.answer_ids(TWO, GREEDY.max_new_tokens)
    # A random model's answer is another one once its weights are rounded.
    assert (stream.sequence.tokens == expected) == (quantization is None)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "paligemma"])
def test_family_answers_random_conversations_as_plain_generate(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_exactness, "noise_image", lambda seed: noise_image(seed, *SIZES[seed]))
    directory = make_family(name, tmp_path / "model")
    how = settings(max_examples=3, stateful_step_count=12)
    test_exactness.run(directory, context_length=300, how=how)
