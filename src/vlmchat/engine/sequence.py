"""A prompt as the engine takes it, and the life of one request in the engine.

Plain Python: no torch, no I/O. A `Sequence` owns the bookkeeping of its tokens and decides its
own end, so that scheduler and engine never count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from vlmchat.engine.detokenizer import Detokenizer
from vlmchat.engine.speculation import PromptLookup
from vlmchat.request import (
    Delta,
    DrawnToken,
    FinishReason,
    Logprob,
    SamplingParams,
    Timings,
    Usage,
)


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where one picture stands in a prompt: from its first to its last placeholder.

    Between them there may be text tokens, where the picture is given in tiles.
    digest: of the picture and the way it was processed.
    inputs: what the model's image processor made of it (numpy arrays by name).
    """

    start: int
    stop: int
    digest: str
    inputs: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and ids to match prefixes by: placeholders replaced by a picture's own integer.

    reusable: keys and values of its beginning may come from another prompt that begins alike.
    """

    ids: tuple[int, ...]
    match_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...] = ()
    reusable: bool = True

    @property
    def num_image_tokens(self) -> int:
        """Tokens that the pictures take."""
        return sum(span.stop - span.start for span in self.images)

    def cut(self, length: int, *, splits_pictures: bool = False) -> int:
        """The last position <= length that is not inside a picture, unless one can be split."""
        if splits_pictures:
            return length
        inside = (span.start for span in self.images if span.start < length < span.stop)
        return min(inside, default=length)

    def part(self, start: int, length: int, *, splits_pictures: bool = False) -> int:
        """Where a part from `start` on that should have `length` tokens ends.

        Sooner or, where a picture begins it, later, so that no picture is split; and a prompt of
        which nothing is reusable has one part.
        """
        if not self.reusable:
            return len(self.ids)
        stop = self.cut(min(start + length, len(self.ids)), splits_pictures=splits_pictures)
        if stop > start:
            return stop
        return next(span.stop for span in self.images if span.start == start)

    def extended(self, tokens: tuple[int, ...]) -> Prompt:
        """With text after it."""
        return Prompt(self.ids + tokens, self.match_ids + tokens, self.images, self.reusable)


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of one sequence in a decode step; its slot already holds `start` positions."""

    slot: int
    start: int
    tokens: tuple[int, ...]  # at least one: the last drawn token, then drafted ones


def image_match_id(digest: str) -> int:
    """A negative integer that stands for a picture: never a token id."""
    return -1 - int(digest[:15], 16)


class Sequence:
    """One request: its prompt, the tokens drawn so far, and where their keys and values lie.

    prefix: what is computed before the first draw: the prompt, and tokens drawn elsewhere before.
    tokens: the answer's, those drawn before included.
    num_computed: so many of the prefix's and the answer's first tokens have keys and values.
    num_encoded: so many of the prompt's pictures were given to the vision tower's cache.
    """

    def __init__(
        self,
        prompt: Prompt,
        params: SamplingParams,
        detokenizer: Detokenizer,
        eos_token_ids: frozenset[int],
        emit: Callable[[Delta | Exception], None],
    ) -> None:
        self.prompt = prompt
        self.prefix = prompt
        self.params = params
        self.tokens: list[int] = []
        self.slot = -1
        self.num_cached = 0
        self.num_computed = 0
        self.num_encoded = 0
        self.cancelled = False  # set from the caller's thread, read by the engine's
        self.finished = False
        self.sampler_state: Any = None
        self.drafter: PromptLookup | None = None
        self._ranked: list[DrawnToken] = []
        self._unsent: list[int] = []
        self._detokenizer = detokenizer
        self._eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self._emit = emit
        self._accepted = time.perf_counter()
        self._first_token: float | None = None
        self._resume(params.resume)

    def cancel(self) -> None:
        """From any thread: end it with the next step."""
        self.cancelled = True

    @property
    def prefilled(self) -> bool:
        """All that precedes the first draw is computed."""
        return self.num_computed >= len(self.prefix.ids)

    @property
    def pending(self) -> tuple[int, ...]:
        """Tokens of the answer whose keys and values are still to be computed."""
        return tuple(self.tokens[self.num_computed - len(self.prompt.ids) :])

    @property
    def num_left(self) -> int:
        """How many more tokens may be drawn."""
        return self.params.max_new_tokens - len(self.tokens)

    @property
    def computed_match_ids(self) -> tuple[int, ...]:
        """Match ids of all tokens whose keys and values exist."""
        return (*self.prompt.match_ids, *self.tokens)[: self.num_computed]

    def append(self, token: int) -> None:
        """Take a newly drawn token: emit its text, or end."""
        if self._first_token is None:
            self._first_token = time.perf_counter()
        self._unsent.append(token)
        text = self._take(token)
        if text and not self.finished:
            self._send(Delta(text))

    def rank(self, likely: Iterable[tuple[int, float]]) -> None:
        """Note (id, logprob) of the token about to be appended, and of the likeliest ones."""
        drawn, *top = (
            Logprob(token, self._detokenizer.text_of(token), logprob) for token, logprob in likely
        )
        self._ranked.append(DrawnToken(drawn, tuple(top)))

    def finish(self, reason: FinishReason) -> None:
        """End now; text held back so far goes out."""
        if not self.finished:
            self._end(reason, self._detokenizer.flush())

    def fail(self, error: Exception) -> None:
        """End with an error, which the reader of the stream will meet."""
        if not self.finished:
            self.finished = True
            self._emit(error)

    def _resume(self, tokens: tuple[int, ...]) -> None:
        """Go on behind tokens that were drawn and sent before. They may be the whole answer."""
        for token in tokens:
            if not self.finished:
                self._take(token)
        # Their keys and values come with the prompt's, where these could not differ.
        pictures = {self.prompt.ids[span.start] for span in self.prompt.images}
        if self.prompt.reusable and pictures.isdisjoint(self.tokens):
            self.prefix = self.prompt.extended(tuple(self.tokens))

    def _take(self, token: int) -> str:
        """Text that is now certain. Ends the sequence where the token does."""
        self.tokens.append(token)
        if token in self._eos_token_ids:
            self.finish(FinishReason.STOP)
            return ""
        text, stopped = self._detokenizer.add(token)
        if stopped:
            self._end(FinishReason.STOP, text)
        elif self.num_left <= 0:
            self._end(FinishReason.LENGTH, text + self._detokenizer.flush())
        return text

    def _end(self, reason: FinishReason, text: str) -> None:
        self.finished = True
        self._send(Delta(text, reason, self._usage(), self._timings()))

    def _send(self, delta: Delta) -> None:
        self._emit(replace(delta, tokens=tuple(self._ranked), token_ids=tuple(self._unsent)))
        self._ranked.clear()
        self._unsent.clear()

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt.ids),
            image_tokens=self.prompt.num_image_tokens,
            cached_tokens=min(self.num_cached, len(self.prompt.ids)),
            completion_tokens=len(self.tokens),
        )

    def _timings(self) -> Timings:
        now = time.perf_counter()
        first = self._first_token or now
        decoded = len(self.tokens) - len(self.params.resume) - 1
        rate = decoded / (now - first) if decoded > 0 and now > first else 0.0
        return Timings(first - self._accepted, now - self._accepted, rate)
