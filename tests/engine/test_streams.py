"""Random streams of requests through the whole engine: each answer is what it would be alone.

Many at once over few slots, prompts in small parts, prefixes copied and thrown out, guesses ahead,
cancels, answers gone on with: against the reference runner with one whole prompt at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule

from tests.engine.reference import Reference
from tests.families import make_family
from tests.pictures import noise_image
from vlmchat.config import EngineConfig
from vlmchat.conversation import Conversation
from vlmchat.engine.engine import Engine, EngineStream
from vlmchat.engine.processor import Processor
from vlmchat.engine.runner import EagerRunner, Row, Runner
from vlmchat.engine.sampler import Sampler
from vlmchat.engine.spec import ModelSpec, read_spec
from vlmchat.engine.speculation import RowCost
from vlmchat.engine.static_runner import StaticRunner
from vlmchat.engine.vision import VisionCache
from vlmchat.request import Delta, FinishReason, SamplingParams, Status

NUM_SLOTS = 3
CONTEXT = 400
LIMITS = EngineConfig(max_num_batched_tokens=7)
# Two tokens only, so that what was said before is often said again.
REPETITIVE = ((70, 100.0), (71, 100.0))
WORDS = ["what", "is", "the colour", "of it", "\n", "é☂", "is it is it is it"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)
PICTURES = st.lists(st.integers(0, 2), max_size=2).map(lambda seeds: tuple(map(noise_image, seeds)))
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    max_new_tokens=st.integers(1, 40),
    seed=st.integers(0, 9),
    repetition_penalty=st.sampled_from([None, None, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    ignore_eos=st.booleans(),
    logit_bias=st.sampled_from([(), REPETITIVE]),
)


class Free(RowCost):
    """Every guess pays."""

    def of(self, num_tokens: int) -> float:
        return 1.0


class Alone:
    """The reference runner with one sequence, its prompt whole, one token a step."""

    def __init__(self, model: Any, spec: ModelSpec, processor: Processor) -> None:
        self._runner = EagerRunner(model, spec, VisionCache(model), 1)
        self._spec = spec
        self._processor = processor
        self._known: dict[Any, list[int]] = {}

    def answer(self, conversation: Conversation, params: SamplingParams) -> list[int]:
        """All token ids of the answer."""
        prompt = self._processor.encode(conversation)
        key = (prompt.match_ids, replace(params, max_new_tokens=40))
        if key not in self._known:
            self._known[key] = list(self._draw(prompt, params))
        return self._known[key][: params.max_new_tokens]

    def _draw(self, prompt: Any, params: SamplingParams) -> Iterator[int]:
        sampler, size = Sampler(), len(prompt.ids)
        state = sampler.start(params, prompt.ids)
        logits = self._runner.prefill(0, prompt, 0, size)
        for index in range(40):
            assert logits is not None
            [token] = sampler.draw([state], [logits])
            yield token
            if token in self._spec.eos_token_ids and not params.ignore_eos:
                return
            state.advance(token)
            [rows] = self._runner.decode([Row(0, size + index, (token,))])
            logits = rows[0]


@dataclass(eq=False)
class Asked:
    """A stream under way."""

    conversation: Conversation
    params: SamplingParams
    stream: EngineStream
    deltas: list[Delta] = field(default_factory=list)

    def read(self, most: int | None = None) -> None:
        """So many more deltas, or all."""
        self.deltas += islice(self.stream, most)

    @property
    def token_ids(self) -> list[int]:
        """Those sent, behind those drawn elsewhere before."""
        sent = (token for delta in self.deltas for token in delta.token_ids)
        return [*self.params.resume[: len(self.stream.sequence.tokens)], *sent]


@dataclass(frozen=True)
class Answered:
    """One that is over, with all its tokens."""

    conversation: Conversation
    params: SamplingParams
    tokens: tuple[int, ...]


class Streams(RuleBasedStateMachine):
    """See the module."""

    engine: Engine
    alone: Alone
    asked = Bundle("asked")
    answered = Bundle("answered")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[Asked] = []

    def ask(self, conversation: Conversation, params: SamplingParams) -> Asked:
        if self.engine.count(conversation).tokens + params.max_new_tokens > CONTEXT:
            conversation = Conversation().ask("short")
        self.open.append(Asked(conversation, params, self.engine.stream(conversation, params)))
        return self.open[-1]

    @rule(target=asked, text=TEXTS, images=PICTURES, params=PARAMS)
    def begin(self, text: str, images: tuple, params: SamplingParams) -> Asked:  # type: ignore[type-arg]
        return self.ask(Conversation().ask(text, images), params)

    @rule(target=asked, texts=st.lists(TEXTS, min_size=2, max_size=6), params=PARAMS)
    def begin_many(self, texts: list[str], params: SamplingParams) -> Any:
        picture = (noise_image(0),)
        return multiple(*(self.ask(Conversation().ask(t, picture), params) for t in texts))

    @rule(target=asked, earlier=answered, text=TEXTS, images=PICTURES, params=PARAMS)
    def go_on(self, earlier: Answered, text: str, images: tuple, params: SamplingParams) -> Asked:  # type: ignore[type-arg]
        said = self.engine._processor.tokenizer.decode(earlier.tokens, skip_special_tokens=True)
        return self.ask(earlier.conversation.answered(said).ask(text, images), params)

    @rule(target=asked, earlier=answered, params=PARAMS)
    def regenerate(self, earlier: Answered, params: SamplingParams) -> Asked:
        return self.ask(earlier.conversation, params)

    @rule(target=asked, earlier=answered, data=st.data())
    def resume(self, earlier: Answered, data: st.DataObject) -> Asked:
        kept = data.draw(st.integers(0, len(earlier.tokens)))
        params = replace(earlier.params, resume=earlier.tokens[:kept])
        return self.ask(earlier.conversation, params)

    @rule(one=asked, count=st.integers(0, 5))
    def read(self, one: Asked, count: int) -> None:
        one.read(count)

    @rule(one=asked)
    def cancel(self, one: Asked) -> None:
        one.stream.cancel()

    @rule(target=answered, one=consumes(asked))
    def finish(self, one: Asked) -> Answered:
        self.open.remove(one)
        self.check(one)
        return Answered(one.conversation, one.params, tuple(one.stream.sequence.tokens))

    def check(self, one: Asked) -> None:
        one.read()
        expected = self.alone.answer(one.conversation, replace(one.params, resume=()))
        tokens = one.stream.sequence.tokens
        if one.deltas[-1].finish_reason is FinishReason.CANCELLED:
            expected = expected[: len(tokens)]
        assert tokens == one.token_ids == expected

    def teardown(self) -> None:
        for one in self.open:
            self.check(one)
        wait_until_idle(self.engine)


def wait_until_idle(engine: Engine) -> None:
    """Every slot comes back once nobody reads any more."""
    deadline = time.monotonic() + 60
    scheduler = engine._scheduler
    while not (scheduler.idle and not engine._inbox and not scheduler._cache.num_busy):
        assert time.monotonic() < deadline, "the engine does not come to rest"
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("family", "kind", "examples"),
    [
        ("llava", "eager", 6),
        ("llava", "static", 12),
        ("gemma3", "eager", 3),
        ("qwen2_vl", "eager", 3),
    ],
)
def test_random_streams_give_each_answer_as_alone(
    family: str, kind: str, examples: int, tmp_path: Path
) -> None:
    reference = Reference(make_family(family, tmp_path / "model"))
    model, hf_processor = reference.model, reference.processor
    spec = replace(
        read_spec(model.config, model.generation_config, hf_processor), context_length=CONTEXT
    )
    processor, vision = Processor(hf_processor, spec), VisionCache(model)
    runner: Runner = EagerRunner(model, spec, vision, NUM_SLOTS)
    alone = Alone(Reference(reference.directory).model, spec, processor)
    if kind == "static":
        runner = StaticRunner(model, spec, vision, NUM_SLOTS, CONTEXT)
    engine = Engine(
        runner, processor, Sampler(), spec.eos_token_ids, Status("tiny", CONTEXT), NUM_SLOTS,
        vision=vision, limits=LIMITS,
    )  # fmt: skip
    engine._row_cost = Free()
    Streams.engine, Streams.alone = engine, alone
    how = settings(max_examples=examples, stateful_step_count=15, deadline=None, derandomize=True)
    machine = Streams.TestCase
    machine.settings = settings(
        how, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    try:
        machine("runTest").runTest()
        load = engine.status().load
        assert load is not None
        assert load.accepted > 10
        assert load.cached_tokens > load.prompt_tokens / 4
    finally:
        engine.close()
