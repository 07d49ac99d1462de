"""Token ids to printable text, piece by piece.

Holds back what may still change: bytes of an unfinished character, and text that may turn out to
be the beginning of a stop string. Used by `Sequence` only. No torch.
"""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one answer: all that `add` and `flush` give, leading blanks removed."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        """tokenizer: a fast transformers tokenizer.  stop: strings that end the answer."""
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._ids: list[int] = []
        self._decoded = ""  # everything the decode stream has given
        self._held = ""  # given, not yet emitted
        self._emitted_any = False

    def add(self, token: int) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string was met (which is not part of it)."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
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

    def flush(self) -> str:
        """All that was held back: an unfinished character becomes U+FFFD, as in a whole decode."""
        whole = self._tokenizer.backend_tokenizer.decode(self._ids, skip_special_tokens=True)
        if whole.startswith(self._decoded):
            self._held += whole[len(self._decoded) :]
        text, self._held = self._held, ""
        return self._emit(text)

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
