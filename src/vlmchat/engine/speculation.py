"""Guess the next tokens of an answer from what was said before, and know when that pays.

Prompt lookup: where the last few tokens stood before, what followed then is likely to follow now.
The guess is computed beside the last drawn token in one decode row, and only what the sampler draws
anyway is kept, so an answer is the same with and without it.

Called by the engine for a stream that decodes alone. Plain Python, a few dictionary look-ups a
token. Source: prompt lookup decoding (Saxena, 2023); measuring guesses that are not made is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, islice, takewhile

MAX_DRAFT = 8
_LONGEST = 4  # tokens to look up
# How fast an estimate follows what is seen, and what it is before anything was seen.
_LEARNING = 0.15
_FIRST = (0.1, 0.3, 0.5, 0.6)  # a guess by 1, 2, 3, 4 tokens is right
_NEXT = 0.7  # so is the token after a right one
# A row of k tokens takes 1 + (k - 1) * slope times as long as one of a single token.
_SLOPE = 0.15
_GAIN = 1.05  # guess only if this much faster


class RowCost:
    """How much longer a decode step takes with more tokens in its row, as measured."""

    def __init__(self, slope: float = _SLOPE) -> None:
        self._slope = slope
        self._single_s: float | None = None

    def note(self, num_tokens: int, seconds: float) -> None:
        """A decode step of one row took so long."""
        if num_tokens == 1:
            # Follows a growing context slowly and forgets a disturbed step soon.
            known = self._single_s or seconds
            rate = 0.5 if seconds < known else _LEARNING
            self._single_s = known + rate * (seconds - known)
            self._slope += 0.01 * (_SLOPE - self._slope)  # so that a bad start is not for ever
        elif self._single_s:
            slope = (seconds / self._single_s - 1) / (num_tokens - 1)
            self._slope += _LEARNING * (min(max(slope, 0.0), 1.0) - self._slope)

    def of(self, num_tokens: int) -> float:
        """In steps of a single token."""
        return 1 + (num_tokens - 1) * self._slope


class PromptLookup:
    """The n-grams of one sequence, what followed them last, and how often that was right.

    Every token is guessed, also where no draft is made: so it is known whether one would pay.
    tokens: match ids; the negative ones are pictures, which no answer holds.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # n-gram -> place after its last one
        self._first = list(_FIRST)
        self._next = _NEXT
        for token in tokens:
            self._add(token)

    def append(self, token: int) -> None:
        """A token was drawn."""
        place, length = self._find()
        if length:
            self._learn(length, self._tokens[place] == token)
        self._add(token)

    def draft(self, most: int, cost: RowCost) -> tuple[int, ...]:
        """The guess, at most `most` tokens, whose expected gain is largest; () if there is none."""
        place, length = self._find()
        if not length:
            return ()
        # What follows may run into the present: then the text goes round, and so does the guess.
        followed = cycle(self._tokens[place : place + MAX_DRAFT])
        found = takewhile(lambda token: token >= 0, islice(followed, min(most, MAX_DRAFT)))
        guess, best, best_rate = [], 0, _GAIN
        expected, chance = 1.0, self._first[length - 1]
        for token in found:
            guess.append(token)
            expected += chance
            chance *= self._next
            if (rate := expected / cost.of(len(guess) + 1)) > best_rate:
                best, best_rate = len(guess), rate
        return tuple(guess[:best])

    def judge(self, drafted: Sequence[int], num_right: int) -> None:
        """So many of the drafted tokens were drawn. The first is judged in `append`."""
        for place in range(1, min(num_right + 1, len(drafted))):
            self._next += _LEARNING * ((place < num_right) - self._next)

    def _learn(self, length: int, right: bool) -> None:
        self._first[length - 1] += _LEARNING * (right - self._first[length - 1])

    def _find(self) -> tuple[int, int]:
        """The place after the last one where the newest tokens stood, and how many of them."""
        for length in range(min(_LONGEST, len(self._tokens)), 0, -1):
            place = self._followed.get(tuple(self._tokens[-length:]))
            if place is not None:
                return place, length
        return 0, 0

    def _add(self, token: int) -> None:
        end = len(self._tokens)
        for length in range(1, min(_LONGEST, end) + 1):
            self._followed[tuple(self._tokens[-length:])] = end
        self._tokens.append(token)
