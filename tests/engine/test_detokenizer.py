"""Detokenizer: pieces that add up to the whole, stop strings that never show."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from tests.tiny import make_tokenizer
from vlmchat.engine.detokenizer import Detokenizer

TOKENIZER = make_tokenizer()


def run(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer, pieces = Detokenizer(TOKENIZER, stop), []
    for token in ids:
        text, stopped = detokenizer.add(token)
        pieces.append(text)
        if stopped:
            return pieces, True
    return [*pieces, detokenizer.flush()], False


@given(st.text(max_size=40))
def test_pieces_of_any_text_add_up_to_it(text: str) -> None:
    pieces, _ = run(TOKENIZER.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text.lstrip()


@given(st.lists(st.integers(4, len(TOKENIZER) - 1), max_size=40))
def test_pieces_of_any_tokens_add_up_to_their_decoding(ids: list[int]) -> None:
    pieces, _ = run(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True).lstrip()


def test_detokenizer_holds_back_an_unfinished_character() -> None:
    pieces, _ = run(TOKENIZER.encode("a☂b", add_special_tokens=False))
    assert "a" in pieces
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("stop", [("###",), ("#x", "###"), ("the end",)])
def test_detokenizer_ends_at_a_stop_string_and_shows_none_of_it(stop: tuple[str, ...]) -> None:
    text = f"one #two ## {stop[-1]} three"
    pieces, stopped = run(TOKENIZER.encode(text, add_special_tokens=False), stop)
    assert stopped
    assert "".join(pieces) == "one #two ## "


def test_detokenizer_gives_back_what_only_looked_like_a_stop_string() -> None:
    pieces, stopped = run(TOKENIZER.encode("one ##", add_special_tokens=False), ("###",))
    assert not stopped
    assert "".join(pieces) == "one ##"


@given(st.text(max_size=20), st.text(max_size=20))
def test_detokenizer_goes_on_behind_a_beginning(begun: str, rest: str) -> None:
    before = TOKENIZER.encode(f"x{begun}", add_special_tokens=False)
    both = TOKENIZER.encode(f"x{begun}{rest}", add_special_tokens=False)
    assume(both[: len(before)] == before)
    detokenizer = Detokenizer(TOKENIZER, after=tuple(before))
    pieces = [detokenizer.add(token)[0] for token in both[len(before) :]]
    assert "".join(pieces) + detokenizer.flush() == rest
