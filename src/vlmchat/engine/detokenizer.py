"""Token ids to printable text, piece by piece.

Holds back what may still change: bytes of an unfinished character, and text that may turn out to
be the beginning of a stop string. Used by `Sequence` only. No torch.
"""

from __future__ import annotations

import re
from typing import Any

# A piece that stands for one byte: what it decodes to depends on the bytes beside it.
BYTE = re.compile("<0x[0-9A-F]{2}>")
# Tokens decoded anew for each new one: at most this many, and half of them after a cut.
WINDOW = 128


class Detokenizer:
    """The text of one answer: all that `add` and `flush` give, leading blanks removed."""

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...] = (), after: tuple[int, ...] = ()
    ) -> None:
        """tokenizer: a fast transformers tokenizer.  stop: strings that end the answer.

        after: where the answer goes on from a beginning, the last tokens of that; a blank that
        comes first is then part of the answer.
        """
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids = list(after)
        self._start = 0
        self._read = len(after)  # ids[start:read] is decoded and given out, behind it nothing
        self._decoded = self._decode(self._ids) if after else ""  # everything that was given out
        self._held = ""  # given, not yet emitted
        self._emitted_any = bool(after)

    def add(self, token: int) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string was met (which is not part of it)."""
        self._ids.append(token)
        piece = self._new_text()
        self._decoded += piece
        self._held += piece
        end = self._find_stop()
        if end is not None:
            text, self._held = self._held[:end], ""
            return self._emit(text), True
        keep = self._possible_stop_length()
        text, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return self._emit(text), False

    def text_of(self, token: int) -> str:
        """One token by itself, special ones too."""
        text: str = self._tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)
        return text

    def flush(self) -> str:
        """All that was held back: an unfinished character becomes U+FFFD, as in a whole decode."""
        whole = self._decode(self._ids)
        if whole.startswith(self._decoded):
            self._held += whole[len(self._decoded) :]
        text, self._held = self._held, ""
        return self._emit(text)

    def _new_text(self) -> str:
        """Text of the tokens behind `read`, once no later token can change it."""
        last = self._ids[-1:]
        if BYTE.fullmatch(self._piece(len(self._ids) - 1)) or not self._decode(last):
            return ""
        before, now = (self._decode(self._ids[self._start : end]) for end in (self._read, None))
        if now.endswith("\ufffd"):
            return ""
        self._read = len(self._ids)
        if self._read - self._start > WINDOW:
            self._cut()
        return now[len(before) :]

    def _cut(self) -> None:
        """Begin the window at a piece that decodes alike at a text's beginning and inside."""
        for start in range(self._read - WINDOW // 2, self._read):
            piece = self._piece(start)
            if piece and piece[0].isalnum():
                self._start = start
                return

    def _piece(self, place: int) -> str:
        return str(self._tokenizer.backend_tokenizer.id_to_token(self._ids[place]) or "")

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True))

    def _emit(self, text: str) -> str:
        # Templates put a blank before the answer; it belongs to them.
        if not self._emitted_any:
            text = text.lstrip()
            self._emitted_any = bool(text)
        return text

    def _find_stop(self) -> int | None:
        found = [at for string in self._stop if (at := self._held.find(string)) >= 0]
        return min(found, default=None)

    def _possible_stop_length(self) -> int:
        """Length of the longest tail that begins some stop string."""
        return max(
            (
                length
                for string in self._stop
                for length in range(1, min(len(string), len(self._held) + 1))
                if self._held.endswith(string[:length])
            ),
            default=0,
        )
