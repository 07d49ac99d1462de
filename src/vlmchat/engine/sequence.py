"""A prompt as the engine takes it, and the life of one request in the engine.

Plain Python: no torch, no I/O. A `Sequence` owns the bookkeeping of its tokens and decides its
own end, so that scheduler and engine never count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vlmchat.engine.detokenizer import Detokenizer
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

    def resume_point(self, num_cached: int) -> int:
        """The last position <= num_cached that is not inside a picture, which goes in whole."""
        if not self.reusable:
            return 0
        inside = (span.start for span in self.images if span.start < num_cached < span.stop)
        return min(inside, default=num_cached)


def image_match_id(digest: str) -> int:
    """A negative integer that stands for a picture: never a token id."""
    return -1 - int(digest[:15], 16)


class Sequence:
    """One request: its prompt, the tokens drawn so far, and where their keys and values lie."""

    def __init__(
        self,
        prompt: Prompt,
        params: SamplingParams,
        detokenizer: Detokenizer,
        eos_token_ids: frozenset[int],
        emit: Callable[[Delta | Exception], None],
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.tokens: list[int] = []
        self.slot = -1
        self.num_cached = 0
        self.cancelled = False  # set from the caller's thread, read by the engine's
        self.finished = False
        self.sampler_state: Any = None
        self._ranked: list[DrawnToken] = []
        self._detokenizer = detokenizer
        self._eos_token_ids = eos_token_ids
        self._emit = emit
        self._accepted = time.perf_counter()
        self._first_token: float | None = None

    @property
    def num_computed(self) -> int:
        """Positions whose keys and values exist: all but the newest drawn token's."""
        return len(self.prompt.ids) + len(self.tokens) - 1

    @property
    def computed_match_ids(self) -> tuple[int, ...]:
        """Match ids of all tokens whose keys and values exist: all but the newest drawn one."""
        return (*self.prompt.match_ids, *self.tokens[:-1])

    def append(self, token: int) -> None:
        """Take a newly drawn token: emit its text, or end."""
        if self._first_token is None:
            self._first_token = time.perf_counter()
        self.tokens.append(token)
        if token in self._eos_token_ids:
            self.finish(FinishReason.STOP)
            return
        text, stopped = self._detokenizer.add(token)
        if stopped:
            self._end(FinishReason.STOP, text)
        elif len(self.tokens) >= self.params.max_new_tokens:
            self._end(FinishReason.LENGTH, text + self._detokenizer.flush())
        elif text:
            self._emit(Delta(text))

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

    def _end(self, reason: FinishReason, text: str) -> None:
        self.finished = True
        self._emit(Delta(text, reason, self._usage(), self._timings(), tuple(self._ranked)))

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt.ids),
            image_tokens=self.prompt.num_image_tokens,
            cached_tokens=self.num_cached,
            completion_tokens=len(self.tokens),
        )

    def _timings(self) -> Timings:
        now = time.perf_counter()
        first = self._first_token or now
        decoded = len(self.tokens) - 1
        rate = decoded / (now - first) if decoded > 0 and now > first else 0.0
        return Timings(first - self._accepted, now - self._accepted, rate)
