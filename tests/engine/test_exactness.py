"""Whatever happens in a conversation, greedy answers equal plain `generate`, token for token."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from transformers import GenerationConfig

from tests.engine.reference import Reference
from tests.pictures import noise_image
from tests.tiny import make_tiny_llava
from vlmchat.config import ModelConfig
from vlmchat.conversation import Conversation
from vlmchat.engine.engine import Engine, EngineStream
from vlmchat.errors import PromptTooLong
from vlmchat.request import SamplingParams
from vlmchat.session import ChatSession, Reply

WORDS = st.lists(
    st.sampled_from(["what", "colour", "is", "the", "picture", "red?", "[x]", "é☂", "\n", "zzz"]),
    min_size=1,
    max_size=12,
).map(" ".join)
PICTURES = st.lists(st.integers(0, 3), max_size=2).map(lambda seeds: tuple(map(noise_image, seeds)))


class Conversations(RuleBasedStateMachine):
    """Random conversations; every answer is compared with the reference on the turns kept."""

    directory: Path
    engine: Engine
    reference: Reference

    @initialize(max_new_tokens=st.integers(1, 24))
    def start(self, max_new_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
        self.session = ChatSession(self.engine, params)

    def finish(self, reply: Reply, stop_after: int | None = None) -> None:
        stream = reply._stream
        assert isinstance(stream, EngineStream)
        try:
            with reply:
                for count, _ in enumerate(reply):
                    if count == stop_after:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        expected = self.reference.answer_ids(reply.conversation, self.session.params.max_new_tokens)
        drawn = stream.sequence.tokens
        if stop_after is None:
            assert drawn == expected
        else:
            assert drawn == expected[: len(drawn)]
        size = self.engine.count(reply.conversation)
        assert size.tokens == self.reference.inputs(reply.conversation)["input_ids"].shape[1]
        assert size.tokens <= self.session.budget

    @rule(text=WORDS, images=PICTURES)
    def ask(self, text: str, images: tuple) -> None:  # type: ignore[type-arg]
        before = self.session.conversation
        try:
            reply = self.session.ask(text, images)
        except PromptTooLong:
            assert self.session.conversation == before
        else:
            self.finish(reply)

    @rule(text=WORDS, stop_after=st.integers(0, 5))
    def ask_and_interrupt(self, text: str, stop_after: int) -> None:
        self.finish(self.session.ask(text), stop_after)

    @precondition(lambda self: self.session.conversation.turns)
    @rule()
    def regenerate(self) -> None:
        self.finish(self.session.regenerate())

    @precondition(lambda self: self.session.conversation.turns)
    @rule(text=WORDS)
    def edit(self, text: str) -> None:
        self.finish(self.session.edit(text))

    @precondition(lambda self: self.session.conversation.turns)
    @rule()
    def undo(self) -> None:
        self.session.undo()

    @precondition(lambda self: self.session.conversation.images)
    @rule(data=st.data())
    def remove_image(self, data: st.DataObject) -> None:
        last = len(self.session.conversation.images) - 1
        self.session.remove_image(data.draw(st.integers(0, last)))

    @rule(text=st.sampled_from(["", "Be brief.", "answer in a poem"]))
    def set_system(self, text: str) -> None:
        self.session.set_system(text)


def test_random_conversations_on_a_tiny_model_equal_plain_generate(tmp_path: Path) -> None:
    directory = make_tiny_llava(tmp_path / "tiny", context_length=256)
    run(directory, None, settings(max_examples=20, stateful_step_count=15))


def test_answers_equal_plain_generate_where_the_checkpoint_has_a_repetition_penalty(
    tmp_path: Path,
) -> None:
    directory = make_tiny_llava(tmp_path / "tiny")
    plain = Reference(directory)
    GenerationConfig(repetition_penalty=1.5, eos_token_id=1).save_pretrained(directory)
    engine, reference = Engine.load(ModelConfig(str(directory), device="cpu")), Reference(directory)
    asked = [Conversation().ask(f"what is it {n}", (noise_image(n),)) for n in range(6)]
    params = SamplingParams(temperature=0, max_new_tokens=30)
    streams = [engine.stream(conversation, params) for conversation in asked]
    for stream in streams:
        list(stream)
    engine.close()
    answers = [stream.sequence.tokens for stream in streams]
    assert answers == [reference.answer_ids(conversation, 30) for conversation in asked]
    assert answers != [plain.answer_ids(conversation, 30) for conversation in asked]


def run(directory: Path, context_length: int | None, how: settings) -> None:
    Conversations.engine = Engine.load(
        ModelConfig(str(directory), context_length=context_length, device="cpu")
    )
    Conversations.reference = Reference(directory)
    machine = Conversations.TestCase
    machine.settings = settings(how, suppress_health_check=list(HealthCheck), derandomize=True)
    try:
        machine("runTest").runTest()
    finally:
        Conversations.engine.close()
