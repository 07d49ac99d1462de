"""The engine's loop over a scripted runner: order, cancelling, failures kept apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from tests.pictures import noise_image
from tests.tiny import make_tiny_llava
from vlmchat.conversation import Conversation
from vlmchat.engine.engine import Engine
from vlmchat.engine.processor import Processor
from vlmchat.engine.runner import Row
from vlmchat.engine.sampler import Sampler
from vlmchat.engine.sequence import Prompt
from vlmchat.engine.spec import read_spec
from vlmchat.errors import EngineDead, OutOfMemory, PromptTooLong, UnsupportedModel
from vlmchat.request import Delta, FinishReason, SamplingParams, Status

GREEDY = SamplingParams(temperature=0, max_new_tokens=20)
QUESTION = Conversation().ask("what is it")


class ScriptedRunner:
    """Says `text` to everyone; `before_step` runs ahead of each prefill and decode."""

    splits_pictures = True

    def __init__(self, tokenizer: object, text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
        self.script = [*ids, tokenizer.eos_token_id]  # type: ignore[attr-defined]
        self.said: dict[int, int] = {}
        self.before_step: Callable[[str], None] = lambda kind: None
        self.prefills: list[tuple[int, int]] = []  # (slot, start)
        self.copies: list[tuple[int, int, int]] = []

    def prefill(self, slot: int, prompt: Prompt, start: int, stop: int) -> torch.Tensor:
        self.before_step("prefill")
        self.prefills.append((slot, start))
        self.said[slot] = 0
        return self._next(slot)

    def decode(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        self.before_step("decode")
        return [self._next(row.slot)[None] for row in rows]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.copies.append((source, target, length))

    def _next(self, slot: int) -> torch.Tensor:
        token = self.script[min(self.said[slot], len(self.script) - 1)]
        self.said[slot] += 1
        return torch.nn.functional.one_hot(torch.tensor(token), 400).float()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    directory: Path = make_tiny_llava(tmp_path_factory.mktemp("tiny"))
    hf_processor = AutoProcessor.from_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    return Processor(hf_processor, read_spec(config, GenerationConfig(), hf_processor))


@pytest.fixture
def engine(processor: Processor) -> Iterator[Engine]:
    runner = ScriptedRunner(processor.tokenizer, "one two three")
    engine = Engine(runner, processor, Sampler(), frozenset({1}), Status("scripted", 256), 2)
    yield engine
    engine.close()


def runner_of(engine: Engine) -> ScriptedRunner:
    assert isinstance(engine._runner, ScriptedRunner)
    return engine._runner


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_engine_streams_an_answer_and_its_counts(engine: Engine) -> None:
    deltas = list(engine.stream(QUESTION, GREEDY))
    last = deltas[-1]
    assert text_of(deltas) == "one two three"
    assert len(deltas) > 2
    assert last.finish_reason is FinishReason.STOP
    assert last.usage is not None
    assert last.usage.prompt_tokens == engine.count(QUESTION).tokens
    assert last.usage.completion_tokens == len(runner_of(engine).script)


def test_engine_ends_at_max_new_tokens(engine: Engine) -> None:
    deltas = list(engine.stream(QUESTION, SamplingParams(temperature=0, max_new_tokens=2)))
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 2


def test_engine_ends_at_a_stop_string(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=20, stop=("two",))
    deltas = list(engine.stream(QUESTION, params))
    assert text_of(deltas) == "one "
    assert deltas[-1].finish_reason is FinishReason.STOP


def test_engine_reuses_the_slot_of_the_same_prompt(engine: Engine) -> None:
    for _ in range(2):
        deltas = list(engine.stream(QUESTION, GREEDY))
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.cached_tokens == engine.count(QUESTION).tokens - 1


def test_engine_serves_several_streams_at_once(engine: Engine) -> None:
    streams = [engine.stream(QUESTION, GREEDY) for _ in range(5)]
    assert [text_of(list(stream)) for stream in streams] == ["one two three"] * 5


def test_engine_stops_a_cancelled_stream_and_goes_on(engine: Engine) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait_in_decode(kind: str) -> None:
        if kind == "decode":
            reached.set()
            go_on.wait(10)

    runner_of(engine).before_step = wait_in_decode
    stream = engine.stream(QUESTION, GREEDY)
    assert reached.wait(10)
    stream.cancel()
    go_on.set()
    assert list(stream)[-1].finish_reason is FinishReason.CANCELLED
    runner_of(engine).before_step = lambda kind: None
    assert text_of(list(engine.stream(QUESTION, GREEDY))) == "one two three"


def test_engine_cancels_a_stream_that_still_waits(engine: Engine) -> None:
    go_on = threading.Event()
    runner_of(engine).before_step = lambda kind: (go_on.wait(10), None)[1]
    running = [engine.stream(QUESTION, GREEDY) for _ in range(2)]
    waiting = engine.stream(QUESTION, GREEDY)
    waiting.cancel()
    go_on.set()
    last = list(waiting)[-1]
    assert last.finish_reason is FinishReason.CANCELLED
    assert last.usage is not None
    assert last.usage.completion_tokens == 0
    assert [text_of(list(stream)) for stream in running] == ["one two three"] * 2


def test_engine_stops_a_stream_that_nobody_holds_any_more(engine: Engine) -> None:
    """Ctrl-C between asking and reading left an answer running, and the next one waiting for it."""
    reached, go_on = threading.Event(), threading.Event()

    def wait(kind: str) -> None:
        reached.set()
        go_on.wait(10)

    runner_of(engine).before_step = wait
    stream = engine.stream(QUESTION, GREEDY)
    sequence = stream.sequence
    assert reached.wait(10)
    del stream
    go_on.set()
    list(engine.stream(QUESTION, GREEDY))
    assert sequence.finished
    assert len(sequence.tokens) == 1


@pytest.mark.parametrize("failing", ["prefill", "decode"])
def test_engine_fails_one_turn_and_lives_when_memory_runs_out(engine: Engine, failing: str) -> None:
    def fail(kind: str) -> None:
        if kind == failing:
            raise OutOfMemory("out of memory during the answer")

    runner_of(engine).before_step = fail
    with pytest.raises(OutOfMemory):
        list(engine.stream(QUESTION, GREEDY))
    runner_of(engine).before_step = lambda kind: None
    deltas = list(engine.stream(QUESTION, GREEDY))
    assert text_of(deltas) == "one two three"
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.cached_tokens == 0


def test_engine_fails_one_turn_and_lives_when_the_output_is_not_a_number(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(runner_of(engine), "_next", lambda slot: torch.full((400,), torch.nan))
        with pytest.raises(UnsupportedModel):
            list(engine.stream(QUESTION, GREEDY))
    assert text_of(list(engine.stream(QUESTION, GREEDY))) == "one two three"


def test_engine_tells_every_stream_when_it_dies(engine: Engine) -> None:
    all_asked = threading.Event()

    def break_down(kind: str) -> None:
        all_asked.wait(10)
        raise ZeroDivisionError("a bug")

    runner_of(engine).before_step = break_down
    streams = [engine.stream(QUESTION, GREEDY) for _ in range(3)]
    all_asked.set()
    for stream in streams:
        with pytest.raises(EngineDead, match="a bug"):
            list(stream)
    with pytest.raises(EngineDead):
        engine.stream(QUESTION, GREEDY)


def test_engine_ends_its_streams_when_closed(engine: Engine) -> None:
    held = threading.Event()
    runner_of(engine).before_step = lambda kind: (held.wait(0.2), None)[1]
    stream = engine.stream(QUESTION, GREEDY)
    engine.close()
    with pytest.raises(EngineDead, match="closed"):
        list(stream)


def test_engine_refuses_a_prompt_that_leaves_no_room(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=250)
    with pytest.raises(PromptTooLong) as caught:
        engine.stream(QUESTION.answered("x").ask("why", (noise_image(1),)), params)
    assert caught.value.limit == 6
    assert caught.value.image_tokens == 4


def test_engine_reports_the_tokens_and_their_logprobs_when_asked(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=20, logprobs=1)
    last = list(engine.stream(QUESTION, params))[-1]
    assert [t.drawn.token_id for t in last.tokens] == runner_of(engine).script
    assert all(t.top == (t.drawn,) for t in last.tokens)
    assert "".join(t.drawn.token for t in last.tokens) == "one two three</s>"
    assert list(engine.stream(QUESTION, GREEDY))[-1].tokens == ()
