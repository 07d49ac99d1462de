"""Processor: the same ids as the checkpoint's own processor, and pictures told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from tests.engine.reference import Reference
from tests.pictures import noise_image
from tests.tiny import make_tiny_llava
from vlmchat.conversation import Conversation, Message
from vlmchat.engine.processor import Processor
from vlmchat.engine.spec import read_spec
from vlmchat.errors import InvalidRequest, UnsupportedModel, VlmchatError

A, B = noise_image(1), noise_image(2)
ONE_TURN = Conversation(system="Be kind.").ask("what is it", (A,)).answered("a thing")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory: Path = make_tiny_llava(tmp_path_factory.mktemp("tiny"))
    return Reference(directory)


@pytest.fixture(scope="module")
def processor(reference: Reference) -> Processor:
    hf = reference.processor
    return Processor(hf, read_spec(reference.model.config, GenerationConfig(), hf))


@pytest.mark.parametrize(
    "conversation",
    [
        pytest.param(Conversation().ask("hello\n  there é☂"), id="text"),
        pytest.param(Conversation().ask("", (A,)), id="picture-without-words"),
        pytest.param(ONE_TURN.ask("and this", (A, B)), id="two-turns-three-pictures"),
    ],
)
def test_ids_equal_those_of_the_checkpoints_own_processor(
    processor: Processor, reference: Reference, conversation: Conversation
) -> None:
    expected = reference.inputs(conversation)["input_ids"][0].tolist()
    assert list(processor.encode(conversation).ids) == expected
    assert processor.count(conversation).tokens == len(expected)


def test_match_ids_tell_pictures_apart_and_keep_the_prefix(processor: Processor) -> None:
    first = processor.encode(Conversation().ask("what", (A,)))
    other = processor.encode(Conversation().ask("what", (B,)))
    both = processor.encode(Conversation().ask("what", (A, B)))
    start, stop = first.images[0].start, first.images[0].stop
    assert first.ids == other.ids
    assert first.match_ids[start:stop] != other.match_ids[start:stop]
    assert both.match_ids[:stop] == first.match_ids[:stop]
    assert first.num_image_tokens == 4


class Counting:
    """A processor that counts its calls."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, **inputs: Any) -> Any:
        self.calls += 1
        return self._processor(**inputs)


def test_each_picture_is_processed_once_in_a_conversation(reference: Reference) -> None:
    counting = Counting(reference.processor)
    spec = read_spec(reference.model.config, GenerationConfig(), counting)
    processor = Processor(counting, spec)
    for conversation in (ONE_TURN.ask("and this", (A, B)), ONE_TURN.ask("why", (B,))):
        processor.count(conversation)
        processor.encode(conversation)
    assert counting.calls == 2


def test_next_turn_begins_with_the_last_prompt(processor: Processor) -> None:
    asked = processor.encode(Conversation().ask("what is it", (A,)))
    conversation = Conversation().ask("what is it", (A,)).answered("a thing").ask("why")
    assert processor.encode(conversation).ids[: len(asked.ids)] == asked.ids


@pytest.mark.parametrize("text", ["<image>", "a</s>b", "<s><pad>"])
def test_special_tokens_typed_by_a_person_stay_text(processor: Processor, text: str) -> None:
    prompt = processor.encode(Conversation().ask(text, (A,)))
    specials = [token for token in prompt.ids if token < 4]
    assert specials == [0, 2, 2, 2, 2]


def test_a_lone_surrogate_in_a_message_becomes_a_question_mark(processor: Processor) -> None:
    """An argument that was no UTF-8 ended in a TypeError of the tokenizer."""
    broken, mended = (Conversation().ask(text) for text in ("a\udcffb", "a?b"))
    assert processor.encode(broken) == processor.encode(mended)


def test_prompt_is_not_cut_inside_a_picture(processor: Processor) -> None:
    prompt = processor.encode(Conversation().ask("what", (A,)))
    start, stop = prompt.images[0].start, prompt.images[0].stop
    assert [prompt.cut(n) for n in (start, start + 1, stop - 1, stop)] == [
        start,
        start,
        start,
        stop,
    ]


@pytest.mark.parametrize(
    ("template", "error"),
    [
        pytest.param("{{ raise_exception('no system role') }}", InvalidRequest, id="refuses"),
        pytest.param("{{ 'USER: ' + messages[0].content }}", InvalidRequest, id="wants-strings"),
        pytest.param("USER: hello", UnsupportedModel, id="leaves-pictures-out"),
    ],
)
def test_processor_says_what_a_checkpoints_template_cannot(
    processor: Processor, template: str, error: type[VlmchatError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_jinja", template)
    with pytest.raises(error, match="--conv-mode takes another template"):
        processor.count(Conversation().ask("what", (A,)))


def test_count_processes_no_picture_twice_however_many_there_are(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation().ask("what", tuple(noise_image(seed) for seed in range(20)))
    processor.count(conversation)
    monkeypatch.setattr(processor, "_process", lambda image: pytest.fail("processed again"))
    assert processor.count(conversation).image_tokens == 80


def test_count_of_an_empty_conversation_is_zero(processor: Processor) -> None:
    assert processor.count(Conversation()).tokens == 0


def test_prompt_that_comes_rendered_has_the_same_ids(processor: Processor) -> None:
    conversation = ONE_TURN.ask("and this", (B,))
    written = processor.render(conversation)
    rendered = Conversation(pending=Message("user", "", (A, B)), rendered=written)
    assert processor.encode(rendered).match_ids == processor.encode(conversation).match_ids


def test_prompt_that_comes_rendered_must_place_its_pictures(processor: Processor) -> None:
    rendered = Conversation(pending=Message("user", "", (A,)), rendered="no place")
    with pytest.raises(InvalidRequest, match="0 places for pictures"):
        processor.encode(rendered)


def test_begun_answer_follows_the_prompt(processor: Processor) -> None:
    conversation = Conversation().ask("what", (A,))
    begun = replace(conversation, begun=" a red</s>")
    assert processor.render(begun) == processor.render(conversation) + " a red< /s>"
