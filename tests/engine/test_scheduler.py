"""Scheduler: turns, parts, pictures, copies, what comes back. Plain Python, no runner."""

from __future__ import annotations

from collections.abc import Iterable

from vlmchat.engine.detokenizer import Detokenizer
from vlmchat.engine.prefix_cache import PrefixCache
from vlmchat.engine.scheduler import Scheduler, Step
from vlmchat.engine.sequence import ImageSpan, Prompt, Sequence
from vlmchat.errors import OutOfMemory
from vlmchat.request import SamplingParams

PICTURE = ImageSpan(4, 24, "digest", {})


class Letters:
    """A tokenizer whose tokens are letters."""

    def __init__(self) -> None:
        self.backend_tokenizer = self

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + token % 26) for token in ids)

    def id_to_token(self, token: int) -> str:
        return self.decode([token])


def sequence(
    ids: Iterable[int], *images: ImageSpan, reusable: bool = True, answer: int = 50
) -> Sequence:
    ids = tuple(ids)
    match_ids = list(ids)
    for span in images:
        match_ids[span.start : span.stop] = [-7] * (span.stop - span.start)
    prompt = Prompt(ids, tuple(match_ids), images, reusable)
    params = SamplingParams(temperature=0, max_new_tokens=answer)
    return Sequence(prompt, params, Detokenizer(Letters()), frozenset(), lambda item: None)


def scheduler_of(*sequences: Sequence, slots: int = 2, splits: bool = False) -> Scheduler:
    scheduler = Scheduler(PrefixCache(slots), 10, splits_pictures=splits)
    for each in sequences:
        scheduler.add(each)
    return scheduler


def run(scheduler: Scheduler) -> Step:
    """One step, as the engine does it; every sequence draws the same token."""
    step = scheduler.schedule()
    if step.prefill is not None and step.prefill.picture is None:
        scheduler.computed(step.prefill.sequence, step.prefill.stop)
        if step.prefill.sequence.prefilled:
            step.prefill.sequence.append(1)
    for each in step.decode:
        scheduler.computed(each, each.num_computed + 1)
        each.append(1)
    scheduler.reap()
    return step


def parts(scheduler: Scheduler, count: int) -> list[tuple[int, int] | str]:
    """What the next steps do for prompts."""
    chunks = [run(scheduler).prefill for _ in range(count)]
    return [("picture" if c.picture else (c.start, c.stop)) if c else "nothing" for c in chunks]


def test_scheduler_computes_a_prompt_in_parts_twice_as_long_while_nobody_waits() -> None:
    assert parts(scheduler_of(sequence(range(45))), 4) == [(0, 20), (20, 40), (40, 45), "nothing"]


def test_scheduler_lets_running_answers_go_on_between_the_parts_of_a_prompt() -> None:
    first, second = sequence(range(5)), sequence(range(100, 125))
    scheduler = scheduler_of(first, second)
    assert parts(scheduler, 4) == [(0, 5), (0, 10), (10, 20), (20, 25)]
    assert (len(first.tokens), len(second.tokens)) == (4, 1)


def test_scheduler_encodes_a_picture_in_a_step_of_its_own_and_never_splits_it() -> None:
    scheduler = scheduler_of(sequence(range(40), PICTURE))
    scheduler._max_num_batched_tokens = 4
    assert parts(scheduler, 5) == [(0, 4), "picture", (4, 24), (24, 32), (32, 40)]


def test_scheduler_splits_a_picture_where_the_runner_can() -> None:
    scheduler = scheduler_of(sequence(range(40), PICTURE), splits=True)
    assert parts(scheduler, 3) == ["picture", (0, 20), (20, 40)]


def test_scheduler_computes_a_prompt_whole_where_nothing_of_it_is_reusable() -> None:
    scheduler = scheduler_of(*(sequence(range(45), reusable=False) for _ in range(2)))
    assert parts(scheduler, 2) == [(0, 45), (0, 45)]


def test_scheduler_computes_a_picture_asked_by_many_at_once_only_once() -> None:
    asked = [sequence([*range(30), *range(n, n + 4)], PICTURE) for n in range(100, 200, 10)]
    scheduler = scheduler_of(*asked, slots=10, splits=True)
    steps = [run(scheduler).prefill for _ in range(12)]
    assert [(c.start, c.stop) for c in steps if c and not c.picture] == [
        (0, 20), (20, 34), *[(30, 34)] * 9
    ]  # fmt: skip
    assert sum(c is not None and c.picture is not None for c in steps) == 1
    assert [c.copy for c in steps if c][3:] == [(0, 30)] * 9
    assert scheduler.load().cached_tokens == 9 * 30


def test_scheduler_keeps_the_order_of_those_who_wait() -> None:
    asked = [sequence([n], answer=3) for n in range(6)]
    scheduler = scheduler_of(*asked)
    begun: list[Sequence] = []
    while not scheduler.idle:
        chunk = run(scheduler).prefill
        begun += [chunk.sequence] if chunk else []
    assert begun == asked


def test_scheduler_ends_a_cancelled_prompt_between_its_parts_and_keeps_what_is_computed() -> None:
    first = sequence(range(60))
    scheduler = scheduler_of(first)
    run(scheduler)
    first.cancelled = True
    assert scheduler.schedule() == Step(None, ())
    assert scheduler.idle
    assert scheduler._cache.num_busy == 0
    scheduler.add(sequence(range(60)))
    assert parts(scheduler, 1) == [(20, 40)]


def test_scheduler_takes_nothing_from_a_slot_that_failed() -> None:
    first = sequence(range(30))
    scheduler = scheduler_of(first, slots=1)
    run(scheduler)
    scheduler.drop(first, OutOfMemory("full"))
    scheduler.add(sequence(range(30)))
    assert parts(scheduler, 1) == [(0, 20)]


def test_scheduler_counts_what_runs_and_what_waits() -> None:
    scheduler = scheduler_of(*(sequence(range(n, n + 30)) for n in (0, 100, 200)), slots=1)
    run(scheduler)
    load = scheduler.load()
    assert (load.running, load.waiting, load.slots) == (1, 2, 1)
    assert load.waiting_tokens == 10 + 30 + 30
