"""How fast a backend answers: first token, prefill, decode, many at once, and the second turn.

Called by the bench command and the benchmarks, over any `Backend`. Measures times and counts; what
the machine could do at most, `Bounds`, is told by whoever knows it. No torch.

Every question is another text under another picture, so that no cache helps but in the second
turn; tokens are drawn at temperature 1, so that nothing can be guessed; no end token ends an
answer early.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import median
from typing import Any

from vlmchat.config import sampling_params
from vlmchat.conversation import Conversation, Image
from vlmchat.errors import ConfigError
from vlmchat.request import Backend, SamplingParams, Stream, Timings, Usage

# Of the JSON object that `report` makes: another number when a field changes its meaning or goes.
VERSION = 1
PICTURE_SIDE = 336  # pixels
_SECOND_QUESTION = "7 8 9 10 11 12 13 14"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    question_tokens: sizes of the question, its picture and the prompt format aside.
    new_tokens: lengths of the answers.  widths: streams at once.  runs: of each; medians are told.
    """

    question_tokens: tuple[int, ...] = (64,)
    new_tokens: tuple[int, ...] = (128,)
    widths: tuple[int, ...] = (1, 2, 4, 8)
    runs: int = 3
    image: bool = True

    def check(self) -> Plan:
        """Itself; ConfigError where a number makes no sense."""
        numbers = {
            "--prompt-tokens": self.question_tokens,
            "--new-tokens": self.new_tokens,
            "--widths": self.widths,
            "--runs": (self.runs,),
        }
        for option, values in numbers.items():
            if not values or min(values) < 1:
                raise ConfigError(f"{option} takes numbers from 1 on, with commas between them")
        if min(self.new_tokens) < 2:
            raise ConfigError("--new-tokens is 1; a decode takes 2 or more")
        return self


@dataclass(frozen=True, slots=True)
class Bounds:
    """What machine and model allow at most: see `engine.machine`. Seconds are work over rates."""

    bytes_s: float
    flops_s: float
    weight_bytes: int
    kv_bytes: int
    token_flops: float
    attention_flops: float
    picture_flops: float

    def prefill_s(self, tokens: int, cached: int = 0, pictures: int = 0) -> float:
        """Least time for the tokens of a prompt that are not cached."""
        new = tokens - cached
        pairs = new * (tokens + cached) / 2
        flops = new * self.token_flops + pairs * self.attention_flops
        arithmetic = (flops + pictures * self.picture_flops) / self.flops_s
        return max(arithmetic, self.weight_bytes / self.bytes_s)

    def decode_s(self, position: float, width: int = 1) -> float:
        """Least time for one token of each of `width` streams that stand at `position`."""
        num_bytes = self.weight_bytes + width * position * self.kv_bytes
        return max(num_bytes / self.bytes_s, width * self.token_flops / self.flops_s)


@dataclass(frozen=True, slots=True)
class Answer:
    """One measured answer. first_s counts from the question, rendering and picture included."""

    text: str
    first_s: float
    total_s: float
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: `width` streams at once, all asked at the same time; medians over the runs.

    turn 2 asks on in the same conversations.  first_token_s: the median stream's; last_first_s:
    the slowest's.  decode: tokens per second of one stream after its first.  total: of all
    streams together, from the first question to the last token.  *_share: the least time that
    machine and model allow over the time taken; None where that is not known.
    """

    width: int
    turn: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_token_s: float
    last_first_s: float
    prefill_tokens_s: float
    decode_tokens_s: float
    total_tokens_s: float
    prefill_share: float | None = None
    decode_share: float | None = None
    total_share: float | None = None


@dataclass(slots=True)
class Questions:
    """Questions of one size, no two alike."""

    backend: Backend
    tokens: int
    image: bool
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    words: int = 0

    def __post_init__(self) -> None:
        """Find how many words have the wanted number of tokens."""
        empty = self._count("")
        low, high = 1, self.tokens + 1
        while low < high:
            middle = (low + high) // 2
            if self._count(self._text(middle)) - empty < self.tokens:
                low = middle + 1
            else:
                high = middle
        self.words = low

    def next(self) -> Conversation:
        """Another one."""
        pictures = (noise(self.draw.getrandbits(32)),) if self.image else ()
        return Conversation().ask(self._text(self.words), pictures)

    def _text(self, words: int) -> str:
        return " ".join(str(self.draw.randrange(1000)) for _ in range(words))

    def _count(self, text: str) -> int:
        size = self.backend.count(Conversation().ask(text))
        return size.tokens if size is not None else len(text.split())


def noise(seed: int, side: int = PICTURE_SIDE) -> Image:
    """A square picture that no other seed gives. side: pixels."""
    from PIL import Image as Pillow

    pixels = random.Random(seed).randbytes(3 * side * side)
    digest = hashlib.sha256(pixels).hexdigest()
    picture = Pillow.frombytes("RGB", (side, side), pixels)
    return Image(picture, b"", f"noise {seed}", digest, digest)


def measure(
    backend: Backend,
    plan: Plan,
    bounds: Bounds | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Iterator[Figure]:
    """A figure for each size, length, width and turn, as they come.

    Raises what the backend raises: PromptTooLong where a size does not fit, OutOfMemory, …
    """
    progress("warming up")
    for tokens in plan.question_tokens:
        questions = Questions(backend, tokens, plan.image)
        for width in plan.widths:
            _ask_all(backend, [questions.next() for _ in range(width)], _params(2))
        for new_tokens in plan.new_tokens:
            for width in plan.widths:
                progress(f"{width} at once, {tokens} tokens asked, {new_tokens} answered")
                yield from _measure(questions, new_tokens, width, plan.runs, bounds)


def _measure(
    questions: Questions, new_tokens: int, width: int, runs: int, bounds: Bounds | None
) -> Iterator[Figure]:
    """Both turns of one width."""
    turns: tuple[list[Figure], list[Figure]] = ([], [])
    for run in range(runs):
        asked = [questions.next() for _ in range(width)]
        for turn, figures in enumerate(turns, 1):
            answers, seconds = _ask_all(questions.backend, asked, _params(new_tokens, run))
            pictures = int(questions.image and turn == 1)
            figures.append(_figure(answers, seconds, turn, pictures, bounds))
            asked = [
                conversation.answered(answer.text.strip()).ask(_SECOND_QUESTION)
                for conversation, answer in zip(asked, answers, strict=True)
            ]
    for figures in turns:
        yield _median(figures)


def _params(new_tokens: int, seed: int = 0) -> SamplingParams:
    params = sampling_params(temperature=1.0, max_new_tokens=new_tokens, seed=seed)
    return replace(params, ignore_eos=True)


def _ask_all(
    backend: Backend, asked: Sequence[Conversation], params: SamplingParams
) -> tuple[list[Answer], float]:
    """All at the same moment, each from a thread of its own; and how long it took altogether."""
    barrier = threading.Barrier(len(asked) + 1)
    streams: list[Stream] = []

    def one(conversation: Conversation) -> Answer:
        barrier.wait()
        return ask(backend, conversation, params, streams.append)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [pool.submit(one, conversation) for conversation in asked]
        try:
            barrier.wait()
            started = time.perf_counter()
            done = [answer.result() for answer in answers]
            return done, time.perf_counter() - started
        except BaseException:  # Ctrl-C too: the pool waits for whoever still answers
            for stream in streams:
                stream.cancel()
            raise


def ask(
    backend: Backend,
    conversation: Conversation,
    params: SamplingParams,
    begun: Callable[[Stream], None] = lambda stream: None,
) -> Answer:
    """One answer, timed. begun: is given the stream as soon as there is one."""
    started = time.perf_counter()
    stream = backend.stream(conversation, params)
    accepted = time.perf_counter() - started
    begun(stream)
    text = ""
    for delta in stream:
        text += delta.text
    seconds = time.perf_counter() - started
    assert delta.usage is not None
    assert delta.timings is not None
    first = accepted + delta.timings.first_token_s
    return Answer(text, first, seconds, delta.usage, delta.timings)


def _figure(
    answers: Sequence[Answer], seconds: float, turn: int, pictures: int, bounds: Bounds | None
) -> Figure:
    """One run as a figure."""
    width, firsts = len(answers), [answer.first_s for answer in answers]
    prompt = int(median(answer.usage.prompt_tokens for answer in answers))
    cached = int(median(answer.usage.cached_tokens for answer in answers))
    new = int(median(answer.usage.completion_tokens for answer in answers))
    first = median(firsts)
    decode = median(answer.timings.tokens_per_second for answer in answers)
    figure = Figure(
        width=width,
        turn=turn,
        prompt_tokens=prompt,
        cached_tokens=cached,
        new_tokens=new,
        first_token_s=first,
        last_first_s=max(firsts),
        prefill_tokens_s=sum(a.usage.prompt_tokens - a.usage.cached_tokens for a in answers)
        / max(firsts),
        decode_tokens_s=decode,
        total_tokens_s=sum(answer.usage.completion_tokens for answer in answers) / seconds,
    )
    if bounds is None:
        return figure
    prefill = width * bounds.prefill_s(prompt, cached, pictures)
    step = bounds.decode_s(prompt + new / 2, width)
    return replace(
        figure,
        prefill_share=prefill / max(firsts),
        decode_share=step * decode,
        total_share=(prefill + (new - 1) * step) / seconds,
    )


def _median(figures: Sequence[Figure]) -> Figure:
    """Field by field."""
    values: dict[str, Any] = {}
    for each in fields(Figure):
        found = [getattr(figure, each.name) for figure in figures]
        if None in found:
            values[each.name] = None
        else:
            values[each.name] = type(found[0])(median(found))
    return Figure(**values)


def report(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """The figures as JSON has them."""
    return [asdict(figure) for figure in figures]
