"""Answers in a given form: which tokens may follow, by llguidance.

`Grammars` is made once for a tokenizer, and gives the sampler a mask for each answer that has a
grammar. JSON comes on one line, with one blank behind each colon and comma, so that no model can
lose itself in blanks. Answers may begin with the blank that SentencePiece puts before words.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from vlmchat.errors import InvalidRequest
from vlmchat.request import Grammar

BLANK = "▁"  # SentencePiece's sign for a space
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_CHARACTERS = 200_000  # of a grammar; llguidance bounds by itself what compiling one takes


class Grammars:
    """Makes masks for one tokenizer's vocabulary."""

    def __init__(self, tokenizer: Any, eos_token_ids: Collection[int]) -> None:
        """tokenizer: a fast transformers tokenizer, or `llava_tokenizer.SentencePieceTokenizer`.

        eos_token_ids: what may end an answer once its form is complete.
        """
        self._hf, self._eos = tokenizer, sorted(eos_token_ids)

    def __call__(self, grammar: Grammar) -> GrammarMask:
        """The mask of an answer that begins. Raises InvalidRequest for a grammar that is none."""
        if len(grammar.text) > _MAX_CHARACTERS:
            raise InvalidRequest(
                f"the grammar has {len(grammar.text)} characters, {_MAX_CHARACTERS} is the most"
            )
        matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"the {grammar.kind} cannot be followed: {_line(matcher)}")
        return GrammarMask(matcher)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Made when first needed: it takes up to a second."""
        backend = self._hf.backend_tokenizer
        if hasattr(self._hf, "is_fast"):
            return LLTokenizer(backend.to_str(), eos_token=self._eos)
        return LLTokenizer(TokenizerWrapper(_Pieces(self._hf, self._eos[0])), eos_token=self._eos)


class GrammarMask:
    """What form one answer must have, and how far it has come. See `sampler.GrammarMask`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def mask(self, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[size] bool: whether each token may follow. Raises InvalidRequest where none can be told.

        Tokens beyond the tokenizer's, with which some models pad their vocabulary, may not.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise InvalidRequest(f"the grammar is too complex: {_line(self._matcher)}")
        allowed = np.zeros(size, np.bool_)
        told = np.unpackbits(bits, bitorder="little")[:size]
        allowed[: len(told)] = told
        return allowed

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [V] as given, but -inf where a token must not follow."""
        allowed = torch.from_numpy(self.mask(logits.shape[-1])).to(logits.device)  # [V]
        return logits.masked_fill(~allowed, -torch.inf)

    def advance(self, token: int) -> None:
        """A token was drawn. Raises InvalidRequest for one that must not follow."""
        if not self._matcher.consume_token(token):
            raise InvalidRequest(f"the grammar does not allow token {token} here")


def _source(grammar: Grammar) -> str:
    """In llguidance's own terms. Raises InvalidRequest."""
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.text))
    if grammar.kind == "lark":
        return str(LLMatcher.grammar_from_lark(grammar.text))
    try:
        schema = json.loads(grammar.text) if grammar.kind == "json_schema" else {"type": "object"}
    except (ValueError, RecursionError):
        raise InvalidRequest("the JSON schema is not JSON") from None
    if not isinstance(schema, dict):
        raise InvalidRequest("the JSON schema is not an object")
    text = json.dumps({**schema, "x-guidance": _JSON})
    return str(LLMatcher.grammar_from_lark(f'start: " "? answer\nanswer: %json {text}'))


def _line(matcher: LLMatcher) -> str:
    """The first line of the library's complaint."""
    lines = [line.strip() for line in matcher.get_error().splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason is told"


class _Pieces:
    """A SentencePiece vocabulary as llguidance wants to see it: each token's bytes."""

    def __init__(self, tokenizer: Any, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos_token_id, tokenizer.bos_token_id
        backend = tokenizer.backend_tokenizer
        pieces = [backend.id_to_token(token) or "" for token in range(len(tokenizer))]
        special = tokenizer.all_special_tokens
        self.special_token_ids = [backend.token_to_id(token) for token in special]
        self.tokens = [_bytes(piece) for piece in pieces]
        self._of_line_break = len(tokenizer("\n", add_special_tokens=False)["input_ids"])

    def __call__(self, text: bytes) -> list[int]:
        """Ids of just these bytes: behind a line break no blank is put before them."""
        encoded = self._tokenizer("\n" + text.decode(errors="replace"), add_special_tokens=False)
        ids: list[int] = encoded["input_ids"][self._of_line_break :]
        if b"".join(self.tokens[token] for token in ids) == text:
            return ids
        return [self.tokens.index(bytes([byte])) for byte in text]  # not UTF-8


def _bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(BLANK, " ").encode()
