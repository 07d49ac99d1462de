"""The engine's loop over a scripted runner: order, cancelling, failures kept apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
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
from vlmchat.errors import EngineDead, InvalidRequest, OutOfMemory, PromptTooLong, UnsupportedModel
from vlmchat.request import Delta, FinishReason, Grammar, SamplingParams, Status

GREEDY = SamplingParams(temperature=0, max_new_tokens=20)
QUESTION = Conversation().ask("what is it")


class ScriptedRunner:
    """Says `text` to everyone; `before_step` runs ahead of each prefill and decode."""

    splits_pictures = True

    def __init__(self, tokenizer: object, text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
        self.script = [*ids, tokenizer.eos_token_id]  # type: ignore[attr-defined]
        self.sizes: dict[int, int] = {}
        self.before_step: Callable[[str], None] = lambda kind: None
        self.prefills: list[tuple[int, int]] = []  # (slot, start)
        self.copies: list[tuple[int, int, int]] = []

    def prefill(self, slot: int, prompt: Prompt, start: int, stop: int) -> torch.Tensor | None:
        self.before_step("prefill")
        self.prefills.append((slot, start))
        self.sizes[slot] = len(prompt.ids)
        return self.logits(0) if stop == len(prompt.ids) else None

    def decode(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        self.before_step("decode")
        return [self._row(row.start + 1 - self.sizes[row.slot], len(row.tokens)) for row in rows]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.copies.append((source, target, length))

    def _row(self, first: int, count: int) -> torch.Tensor:
        return torch.stack([self.logits(place) for place in range(first, first + count)])

    def logits(self, place: int) -> torch.Tensor:
        token = self.script[min(place, len(self.script) - 1)]
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


def test_engine_decodes_one_by_one_what_memory_does_not_hold_at_once(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ScriptedRunner(processor.tokenizer, "one two three")
    widths, decode = [], runner.decode

    def fail(rows: Sequence[Row]) -> list[torch.Tensor]:
        widths.append(len(rows))
        if len(rows) > 1:
            raise OutOfMemory("out of memory during the answer")
        return decode(rows)

    monkeypatch.setattr(runner, "decode", fail)
    engine = Engine(runner, processor, Sampler(), frozenset({1}), Status("scripted", 256), 2)
    params = replace(GREEDY, max_new_tokens=40, ignore_eos=True)
    with closing(engine):
        alone = text_of(list(engine.stream(QUESTION, params)))
        streams = [engine.stream(QUESTION, params) for _ in range(2)]
        assert [text_of(list(stream)) for stream in streams] == [alone, alone]
    assert max(widths) == 2


def test_engine_fails_one_turn_and_lives_when_the_output_is_not_a_number(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(runner_of(engine), "logits", lambda place: torch.full((400,), torch.nan))
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


def test_engine_tells_of_no_room_where_the_answer_alone_is_too_long(engine: Engine) -> None:
    with pytest.raises(PromptTooLong, match="has room for 0;"):
        engine.stream(QUESTION, replace(GREEDY, max_new_tokens=10_000))


def test_engine_reports_the_tokens_and_their_logprobs_when_asked(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=20, logprobs=1)
    deltas = list(engine.stream(QUESTION, params))
    tokens = [token for delta in deltas for token in delta.tokens]
    assert [t.drawn.token_id for t in tokens] == runner_of(engine).script
    assert all(t.top == (t.drawn,) for t in tokens)
    assert "".join(t.drawn.token for t in tokens) == "one two three</s>"
    assert not any(delta.tokens for delta in engine.stream(QUESTION, GREEDY))


def test_engine_tells_the_logprobs_with_the_text_of_their_tokens(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=20, logprobs=0)
    for delta in engine.stream(QUESTION, params):
        assert tuple(t.drawn.token_id for t in delta.tokens) == delta.token_ids


class Ends:
    """A grammar that allows one token only and is over after two."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.drawn = 0

    @property
    def finished(self) -> bool:
        return self.drawn == 2

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor(self.token), 0.0)

    def advance(self, token: int) -> None:
        assert token == self.token
        self.drawn += 1


def test_engine_draws_only_what_a_grammar_allows_and_ends_with_it(processor: Processor) -> None:
    runner = ScriptedRunner(processor.tokenizer, "one two three")
    sampler = Sampler(make_grammar=lambda grammar: Ends(int(grammar.text)))
    engine = Engine(runner, processor, sampler, frozenset({1}), Status("scripted", 256))
    params = replace(GREEDY, grammar=Grammar("regex", "7"))
    deltas = list(engine.stream(QUESTION, params))
    engine.close()
    assert [token for delta in deltas for token in delta.token_ids] == [7, 7]
    assert deltas[-1].finish_reason is FinishReason.STOP


def test_engine_without_grammars_refuses_a_request_for_one(engine: Engine) -> None:
    with pytest.raises(InvalidRequest):
        engine.stream(QUESTION, replace(GREEDY, grammar=Grammar("regex", "7")))


def test_engine_goes_on_where_the_end_token_is_ignored(engine: Engine) -> None:
    last = list(engine.stream(QUESTION, replace(GREEDY, ignore_eos=True)))[-1]
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage is not None
    assert last.usage.completion_tokens == GREEDY.max_new_tokens


def test_engine_sends_every_token_id_once(engine: Engine) -> None:
    deltas = list(engine.stream(QUESTION, GREEDY))
    assert [t for delta in deltas for t in delta.token_ids] == runner_of(engine).script


def test_engine_sends_nothing_again_of_an_answer_it_goes_on_with(engine: Engine) -> None:
    runner = runner_of(engine)
    kept, rest = tuple(runner.script[:3]), runner.script[3:]
    runner.script = rest
    deltas = list(engine.stream(QUESTION, replace(GREEDY, resume=kept)))
    assert [t for delta in deltas for t in delta.token_ids] == rest
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == len(kept) + len(rest)
    assert deltas[-1].usage.prompt_tokens == engine.count(QUESTION).tokens


def test_engine_ends_at_once_what_was_answered_before(engine: Engine) -> None:
    params = replace(GREEDY, resume=tuple(runner_of(engine).script))
    assert [d.finish_reason for d in engine.stream(QUESTION, params)] == [FinishReason.STOP]


def test_engine_tells_what_it_does_and_has_done(engine: Engine) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(kind: str) -> None:
        reached.set()
        go_on.wait(10)

    runner_of(engine).before_step = wait
    streams = [engine.stream(QUESTION, GREEDY) for _ in range(5)]
    assert reached.wait(10)
    load = engine.status().load
    assert load is not None
    assert (load.running + load.waiting, load.slots) == (5, 2)
    go_on.set()
    for stream in streams:
        list(stream)
    load = engine.status().load
    assert load is not None
    assert (load.running, load.waiting, load.waiting_tokens) == (0, 0, 0)
    assert load.prompt_tokens == 5 * engine.count(QUESTION).tokens
    assert load.generated_tokens == 5 * len(runner_of(engine).script)


def test_engine_cancels_between_the_parts_of_a_prompt(engine: Engine) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(kind: str) -> None:
        reached.set()
        go_on.wait(10)

    runner_of(engine).before_step = wait
    engine._scheduler._max_num_batched_tokens = 4
    stream = engine.stream(QUESTION, GREEDY)
    assert reached.wait(10)
    stream.cancel()
    go_on.set()
    assert list(stream)[-1].finish_reason is FinishReason.CANCELLED
    assert runner_of(engine).prefills == [(0, 0)]


def test_engine_copies_what_another_slot_has_of_a_picture(engine: Engine) -> None:
    pictures = (noise_image(1),)
    asked = [Conversation("be brief " * 5).ask(text, pictures) for text in ("what", "why")]
    both = threading.Event()
    runner_of(engine).before_step = lambda kind: both.wait(10)
    streams = [engine.stream(conversation, GREEDY) for conversation in asked]
    both.set()
    for stream in streams:
        list(stream)
    [(source, target, length)] = runner_of(engine).copies
    assert (source, target) == (0, 1)
    [span] = engine._processor.encode(asked[0]).images
    assert length >= span.stop


def test_engine_warms_up_and_leaves_nothing(engine: Engine) -> None:
    assert engine.warm_up().wait(60)
    runner = runner_of(engine)
    assert runner.prefills[0] == (0, 0)
    load = engine.status().load
    assert load is not None
    assert (load.prompt_tokens, load.images, load.generated_tokens) == (0, 0, 0)
    first = len(runner.prefills)
    deltas = list(engine.stream(QUESTION, GREEDY))
    assert runner.prefills[first:] == [(0, 0)]
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.cached_tokens == 0


def test_engine_warm_up_ends_when_somebody_asks(engine: Engine) -> None:
    runner, begun, asked = runner_of(engine), threading.Event(), threading.Event()
    kinds: list[str] = []

    def step(kind: str) -> None:
        kinds.append(kind)
        if len(kinds) == 1:
            begun.set()
            asked.wait(60)

    runner.before_step = step
    over = engine.warm_up()
    assert begun.wait(60)
    stream = engine.stream(QUESTION, GREEDY)
    asked.set()
    assert text_of(list(stream)) == "one two three"
    assert kinds[:3] == ["prefill", "prefill", "decode"]  # no decode of the warm-up's between
    assert over.is_set()


def test_engine_does_not_warm_up_once_a_slot_is_used(engine: Engine) -> None:
    list(engine.stream(QUESTION, GREEDY))
    before = len(runner_of(engine).prefills)
    assert engine.warm_up().wait(60)
    assert len(runner_of(engine).prefills) == before
