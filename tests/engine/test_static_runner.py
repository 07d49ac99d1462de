"""The fast runner against plain `generate`: in parts, from prefixes, many at once, with drafts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.engine.originals import ASKED, first_logits, load
from tests.engine.reference import Reference
from tests.families import make_family
from tests.original import ANYRES, make_original
from tests.pictures import noise_image
from vlmchat.config import DEMO_MODEL, ImagePolicy, ModelConfig
from vlmchat.conversation import Conversation
from vlmchat.engine.hub import find_checkpoint
from vlmchat.engine.loader import load_model
from vlmchat.engine.processor import Processor
from vlmchat.engine.runner import EagerRunner, Row
from vlmchat.engine.sequence import Prompt
from vlmchat.engine.spec import read_spec
from vlmchat.engine.static_runner import StaticRunner, StepShape, step_shape, unsupported
from vlmchat.engine.vision import VisionCache
from vlmchat.images import ImageLoader

PROVEN = [
    *("llava", "llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
]
NUM_SLOTS, CONTEXT, NEW_TOKENS = 8, 400, 10
WIDE, TALL, SMALL = noise_image(1, 90, 30), noise_image(2, 33, 70), noise_image(3, 20, 20)

ONE = Conversation().ask("what is it", (WIDE,))
TWO = ONE.answered("it is red").ask("and these", (TALL, SMALL))
THREE = TWO.answered("").ask("\nwhy is it blue")
OTHER = Conversation().ask("what is it", (TALL,))
EIGHT = (
    *(ONE, TWO, THREE, OTHER, Conversation().ask("hello")),
    Conversation(system="be brief").ask("this", (SMALL, SMALL)),
    *(Conversation().ask("w " * n, (SMALL,)) for n in (1, 40)),
)


class Case:
    """A model with its reference, and a runner whose cache is NaN wherever nothing was written."""

    def __init__(self, directory: Path, kv_dtype: torch.dtype | None = None) -> None:
        self.reference = Reference(directory)
        self.model = self.reference.model
        self.spec = read_spec(
            self.model.config, self.model.generation_config, self.reference.processor
        )
        self.processor = Processor(self.reference.processor, self.spec)
        self.vision = VisionCache(self.model)
        assert unsupported(self.model, self.spec) is None
        self.runner = self.fresh(kv_dtype)
        self._answers: dict[Conversation, list[int]] = {}

    def fresh(self, kv_dtype: torch.dtype | None = None) -> StaticRunner:
        """Another runner over the same model."""
        runner = StaticRunner(self.model, self.spec, self.vision, NUM_SLOTS, CONTEXT, kv_dtype)
        if kv_dtype is None:
            runner._cache.data.fill_(torch.nan)
        return runner

    def fixed(self, kv_dtype: torch.dtype | None = None) -> StaticRunner:
        """One that decodes as on a GPU."""
        spec, vision = self.spec, self.vision
        return StaticRunner(self.model, spec, vision, NUM_SLOTS, CONTEXT, kv_dtype, fixed=True)

    def expected(self, conversation: Conversation) -> list[int]:
        """Plain `generate`, end token included."""
        if conversation not in self._answers:
            ids = self.reference.answer_ids(conversation, NEW_TOKENS)
            self._answers[conversation] = ids
        return self._answers[conversation]

    def prompt(self, conversation: Conversation) -> Prompt:
        """The conversation as the engine would give it."""
        return self.processor.encode(conversation)

    def answers(
        self, slots: dict[int, tuple[Prompt, torch.Tensor]], runner: StaticRunner | None = None
    ) -> dict[int, list[int]]:
        """Greedy answers of all slots, decoded together; given prompts' logits by slot."""
        runner = runner or self.runner
        tokens = {slot: [int(logits.argmax())] for slot, (_, logits) in slots.items()}

        def open_slots() -> list[int]:
            eos = self.spec.eos_token_ids
            return [s for s, t in tokens.items() if t[-1] not in eos and len(t) < NEW_TOKENS]

        while running := open_slots():
            starts = {s: len(slots[s][0].ids) + len(tokens[s]) - 1 for s in running}
            rows = [Row(s, starts[s], (tokens[s][-1],)) for s in running]
            for slot, logits in zip(running, runner.decode(rows), strict=True):
                tokens[slot].append(int(logits[0].argmax()))
        return tokens

    def answer(self, prompt: Prompt, slot: int, logits: torch.Tensor) -> list[int]:
        """Of one slot alone."""
        return self.answers({slot: (prompt, logits)})[slot]


def prefill(
    runner: StaticRunner, slot: int, prompt: Prompt, cuts: Sequence[int] = (), start: int = 0
) -> torch.Tensor:
    """In parts that end at `cuts`."""
    logits = None
    for stop in (*cuts, len(prompt.ids)):
        assert logits is None
        logits = runner.prefill(slot, prompt, start, stop)
        start = stop
    assert logits is not None
    return logits


@pytest.fixture(scope="module", params=PROVEN)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(make_family(request.param, tmp_path_factory.mktemp(request.param) / "model"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(make_family("llava", tmp_path_factory.mktemp("llava") / "model"))


def test_static_runner_answers_as_generate_when_eight_go_together(case: Case) -> None:
    prompts = [case.prompt(conversation) for conversation in EIGHT]
    slots = {i: (p, prefill(case.runner, i, p)) for i, p in enumerate(prompts)}
    answers = case.answers(slots)
    for slot, conversation in enumerate(EIGHT):
        assert answers[slot] == case.expected(conversation)


def test_static_runner_answers_as_generate_when_prompts_come_in_parts(case: Case) -> None:
    prompt = case.prompt(THREE)
    whole = prefill(case.runner, 0, prompt)
    for cut in range(1, len(prompt.ids)):
        torch.testing.assert_close(
            prefill(case.runner, 1, prompt, [cut]), whole, rtol=1e-3, atol=1e-3
        )
    every = range(7, len(prompt.ids), 7)
    logits = prefill(case.runner, 2, prompt, every)
    assert case.answer(prompt, 2, logits) == case.expected(THREE)


def test_static_runner_answers_as_generate_from_the_prefix_of_another_prompt(case: Case) -> None:
    prefill(case.runner, 3, case.prompt(THREE))
    prompt = case.prompt(TWO.answered("no").ask("and now", (WIDE,)))
    pairs = zip(prompt.match_ids, case.prompt(THREE).match_ids, strict=False)
    common = [a == b for a, b in pairs].index(False)
    assert common > prompt.images[0].stop
    logits = prefill(case.runner, 3, prompt, start=common)
    expected = case.expected(TWO.answered("no").ask("and now", (WIDE,)))
    assert case.answer(prompt, 3, logits) == expected


def test_static_runner_copies_a_prefix_from_a_slot_that_goes_on(case: Case) -> None:
    one, two = case.prompt(ONE), case.prompt(OTHER)
    inside = one.images[0].start + 2  # the pictures differ: the second one is computed anew
    logits = prefill(case.runner, 0, one)
    case.runner.copy_prefix(0, 5, len(one.ids) - 1)
    again = prefill(case.runner, 5, one, start=len(one.ids) - 1)
    case.runner.copy_prefix(0, 6, inside)
    other = prefill(case.runner, 6, two, start=one.images[0].start)
    answers = case.answers({0: (one, logits), 5: (one, again), 6: (two, other)})
    assert answers[0] == answers[5] == case.expected(ONE)
    assert answers[6] == case.expected(OTHER)


def test_static_runner_decodes_drafts_as_one_token_after_the_other(case: Case) -> None:
    prompts = {0: case.prompt(TWO), 1: case.prompt(OTHER)}
    drafts = {0: (5, 9, 7, 6), 1: (8, 8)}
    single = {}
    for slot, prompt in prompts.items():
        length = len(prompt.ids)
        prefill(case.runner, slot, prompt)
        steps = [Row(slot, length + i, (token,)) for i, token in enumerate(drafts[slot])]
        single[slot] = torch.cat([case.runner.decode([step])[0] for step in steps])
    wrong = [Row(slot, len(prompts[slot].ids), (6, 6, 6, 6, 6)) for slot in prompts]
    case.runner.decode(wrong)  # what a rejected draft leaves behind
    rows = [Row(slot, len(prompts[slot].ids), drafts[slot]) for slot in prompts]
    for slot, found in zip(prompts, case.runner.decode(rows), strict=True):
        torch.testing.assert_close(found, single[slot], rtol=1e-3, atol=1e-3)


def test_static_runner_decodes_rows_as_each_alone_when_rows_end_and_lengths_differ(
    llava: Case,
) -> None:
    prompts = [llava.prompt(conversation) for conversation in EIGHT]
    for slot, prompt in enumerate(prompts):
        prefill(llava.runner, slot, prompt)
    rows = [
        Row(slot, len(prompt.ids), (7,) * (slot % 3 + 1)) for slot, prompt in enumerate(prompts)
    ]
    together = llava.runner.decode(rows[::-1])[::-1]
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found, llava.runner.decode([row])[0], rtol=1e-3, atol=1e-3)


def test_static_runner_writes_to_no_other_slot_and_no_other_position(llava: Case) -> None:
    runner, prompt = llava.fresh(), llava.prompt(TWO)
    prefill(runner, 3, prompt, [20])
    runner.decode([Row(3, len(prompt.ids), (5, 6))])
    written = ~runner._cache.data.isnan()
    expected = torch.zeros_like(written)
    expected[:, 3, :, : len(prompt.ids) + 2] = True
    assert torch.equal(written, expected)


def test_static_runner_in_8_bits_is_near_and_does_not_depend_on_parts_or_company(
    case: Case,
) -> None:
    runner, prompt = case.fresh(torch.int8), case.prompt(TWO)
    exact = prefill(case.runner, 0, prompt)
    found = prefill(runner, 0, prompt)
    spread = float(exact.std())
    assert 0 < float((found - exact).abs().max()) < 0.5 * spread
    parts = prefill(runner, 1, prompt, [9, 30, 31])
    torch.testing.assert_close(parts, found, rtol=1e-3, atol=0.05 * spread)
    runner.copy_prefix(1, 2, len(prompt.ids))
    rows = [Row(slot, len(prompt.ids), (5,)) for slot in (0, 1, 2)]
    for logits in runner.decode(rows):
        torch.testing.assert_close(logits, runner.decode(rows[:1])[0], rtol=1e-3, atol=1e-3)


def test_static_runner_in_fixed_shapes_answers_as_generate_with_idle_slots_between(
    case: Case,
) -> None:
    runner, order = case.fixed(), (6, 1, 4, 3)
    prompts = {slot: case.prompt(asked) for slot, asked in zip(order, EIGHT[:4], strict=True)}
    slots = {slot: (prompt, prefill(runner, slot, prompt)) for slot, prompt in prompts.items()}
    for slot in range(NUM_SLOTS):
        length = len(prompts[slot].ids) if slot in prompts else 0
        runner._cache.data[:, slot, :, length:] = 1e3 if length else torch.nan
    answers = case.answers(slots, runner)
    for slot, conversation in zip(order, EIGHT, strict=False):
        assert answers[slot] == case.expected(conversation)


def test_static_runner_in_fixed_shapes_answers_as_generate_when_few_rows_are_gathered(
    case: Case,
) -> None:
    runner, one, two = case.fixed(), case.prompt(ONE), case.prompt(OTHER)
    slots = {7: (one, prefill(runner, 7, one)), 0: (two, prefill(runner, 0, two))}
    answers = case.answers(slots, runner)
    assert step_shape([7, 0], NUM_SLOTS, 9, CONTEXT).first is None
    assert answers == {7: case.expected(ONE), 0: case.expected(OTHER)}


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_static_runner_in_fixed_shapes_gives_the_logits_of_each_row_alone(
    kv_dtype: torch.dtype | None, llava: Case
) -> None:
    each, fixed = llava.fresh(kv_dtype), llava.fixed(kv_dtype)
    prompt = llava.prompt(Conversation().ask("w " * 180, (SMALL,)))
    for runner in (each, fixed):
        for slot in (2, 3):
            prefill(runner, slot, prompt)
    for longest in (254, 255, 256, 257):
        rows = [Row(3, longest, (7,)), Row(2, 100, (8,))]
        for found, expected in zip(fixed.decode(rows), each.decode(rows), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_static_runner_in_fixed_shapes_fills_a_slot_to_its_last_position(llava: Case) -> None:
    each, fixed = llava.fresh(), llava.fixed()
    prompt = llava.prompt(Conversation().ask("w " * 180, (SMALL,)))
    for runner in (each, fixed):
        prefill(runner, 1, prompt)
    for start in range(len(prompt.ids), CONTEXT):
        row = Row(1, start, (start % 50,))
        found, expected = fixed.decode([row])[0], each.decode([row])[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("again", ["prompt", "copy", "decode"])
def test_static_runner_in_fixed_shapes_outlives_what_was_no_number(again: str, llava: Case) -> None:
    runner, short, long = llava.fixed(), llava.prompt(OTHER), llava.prompt(THREE)
    length = len(short.ids)
    prefill(runner, 5, short)
    prefill(runner, 4, long)
    runner._cache.data[:, 4, :, : len(long.ids)] = torch.nan
    if again == "copy":
        runner.copy_prefix(5, 4, length - 1)
        logits = prefill(runner, 4, short, start=length - 1)
    else:
        logits = prefill(runner, 4, short)
    if again == "decode":  # of a draft, which is refused
        runner.decode([Row(4, length, (5, 6, 7))])
        runner._cache.data[:, 4, :, length : length + 3] = torch.nan
    assert llava.answers({4: (short, logits)}, runner)[4] == llava.expected(OTHER)


def test_static_runner_in_fixed_shapes_leaves_what_others_keep(llava: Case) -> None:
    runner, prompt = llava.fixed(), llava.prompt(TWO)
    for slot in range(NUM_SLOTS):
        prefill(runner, slot, prompt)
    before = runner._cache.data[:, :, :, :CONTEXT].clone()
    rows = [Row(slot, len(prompt.ids) - 4, (5,)) for slot in (2, 7)]
    for chosen in (rows, rows[1:], [*rows, Row(4, 30, (6,))]):
        runner.decode(chosen)
    changed = (runner._cache.data[:, :, :, :CONTEXT] != before).any(-1).any(2).any(0)  # [S, T]
    start = len(prompt.ids) - 4
    assert {tuple(place) for place in changed.nonzero().tolist() if place[1] <= start} <= {
        *((2, start), (7, start), (4, 30)),
        *((4, position) for position in range(31, start + 1)),  # cleared
    }
    assert not changed[[0, 1, 3, 5, 6]].any()


@pytest.mark.parametrize(
    ("slots", "longest", "expected"),
    [
        ([5], 1, StepShape(5, 1, 256)),
        ([2, 3], 256, StepShape(2, 2, 256)),
        ([1, 2], 257, StepShape(0, 4, 384)),
        ([1, 2, 0], 385, StepShape(0, 4, 512)),
        ([0, 9], 769, StepShape(None, 2, 1000)),
        ([8, 11], 1000, StepShape(8, 4, 1000)),
        ([0, 3, 9, 11], 1, StepShape(0, 12, 256)),
        ([*range(12)], 1, StepShape(0, 12, 256)),
    ],
)
def test_step_shape_is_the_smallest_that_holds_the_slots(
    slots: list[int], longest: int, expected: StepShape
) -> None:
    assert step_shape(slots, 12, longest, 1000) == expected


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_static_runner_is_near_the_reference_in_bfloat16_and_packed(
    kind: str | None, tied: bool, tmp_path: Path
) -> None:
    directory = make_family("llava", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = tied
    (directory / "config.json").write_text(json.dumps(config))
    chosen = ModelConfig(str(directory), device="cpu", dtype="bfloat16", quantization=kind)
    loaded = load_model(chosen, lambda stage: None)
    prompt = Processor(loaded.processor, loaded.spec, loaded.template).encode(TWO)
    vision, row = VisionCache(loaded.model), Row(0, len(prompt.ids), (5, 6, 7))
    eager = EagerRunner(loaded.model, loaded.spec, vision, 1)
    expected = [eager.prefill(0, prompt, 0, len(prompt.ids)), *eager.decode([row])]
    static = StaticRunner(loaded.model, loaded.spec, vision, 1, CONTEXT)
    found = [prefill(static, 0, prompt, [20]), *static.decode([row])]
    for one, other in zip(expected, found, strict=True):
        assert one is not None
        difference = (one.float() - other.float()).std()
        assert float(difference) < 0.05 * float(one.float().std())


def test_static_runner_answers_as_generate_with_the_demo_model() -> None:
    case = Case(find_checkpoint(DEMO_MODEL, None, lambda stage: None))
    picture = ImageLoader(ImagePolicy()).load("examples/shapes.png")
    for question in ("Describe the image.", "How many shapes are there?"):
        asked = Conversation().ask(question, (picture,))
        prompt = case.prompt(asked)
        logits = prefill(case.runner, 0, prompt, [30])
        assert case.answer(prompt, 0, logits) == case.expected(asked)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="vicuna"),
        pytest.param(ANYRES, id="anyres"),
        pytest.param({"model_type": "llava_mistral", "num_key_value_heads": 2}, id="mistral"),
    ],
)
def test_static_runner_gives_the_logits_of_checkpoints_in_llavas_own_layout(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    made = make_original(tmp_path / "made", **changes)
    loaded = load(made.directory)
    expected = first_logits(loaded)
    prompt = Processor(loaded.processor, loaded.spec, loaded.template).encode(ASKED)
    runner = StaticRunner(loaded.model, loaded.spec, VisionCache(loaded.model), 1, CONTEXT)
    logits = prefill(runner, 0, prompt, [30, 50])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "attend to later"),
        ("paligemma", "attend to later"),
    ],
)
def test_unsupported_says_why_of_families_that_are_not_plain(
    name: str, reason: str, tmp_path: Path
) -> None:
    reference = Reference(make_family(name, tmp_path / "model"))
    model = reference.model
    spec = read_spec(model.config, model.generation_config, reference.processor)
    assert reason in str(unsupported(model, spec))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "'dynamic'"),
        (hf.MistralConfig(sliding_window=64), "last 64 tokens"),
        (hf.MistralConfig(sliding_window=CONTEXT), None),
        (hf.GemmaConfig(), "GemmaModel"),
        (hf.Qwen3Config(), None),
    ],
    ids=lambda value: getattr(value, "model_type", "reason"),
)
def test_unsupported_says_why_of_language_models_that_are_not_plain(
    config: Any, reason: str | None, llava: Case
) -> None:
    spec = llava.spec.__class__("LLaVA", "<image>", 2, frozenset(), CONTEXT)
    whole = hf.LlavaConfig(text_config=config, vision_config=hf.CLIPVisionConfig())
    with torch.device("meta"):
        model = hf.LlavaForConditionalGeneration(whole)
    found = unsupported(model, spec)
    assert found is None if reason is None else reason in str(found)
