"""Ids of original checkpoints: SentencePiece itself, stretch by stretch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.original import num_pieces, sentencepiece_model, write_json, write_tokenizer
from vlmchat.engine.detokenizer import Detokenizer
from vlmchat.engine.llava_processor import PromptTokenizer
from vlmchat.engine.llava_tokenizer import SentencePieceTokenizer, read_tokenizer
from vlmchat.errors import CheckpointError

BOS, EOS = 1, 2
IMAGE = 9000


@pytest.fixture(scope="module")
def pieces() -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())


def read(directory: Path, **settings: Any) -> SentencePieceTokenizer:
    write_tokenizer(directory, **settings)
    tokenizer = read_tokenizer(directory)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("text", ["USER: hello", " two  blanks ", "\nnew\nline", "é☂ ▁", "x"])
def test_plain_text_gets_sentencepieces_own_ids(
    tmp_path: Path, pieces: Any, text: str, legacy: bool | None
) -> None:
    assert ids_of(read(tmp_path, legacy=legacy), text) == [BOS, *pieces.encode(text)]


def test_empty_text_is_the_beginning_only(tmp_path: Path) -> None:
    assert ids_of(read(tmp_path), "") == [BOS]


@pytest.mark.parametrize("legacy", [True, None])
def test_text_behind_an_end_begins_anew_in_the_older_way(
    tmp_path: Path, pieces: Any, legacy: bool | None
) -> None:
    """An absent `legacy` means the older way."""
    expected = [BOS, *pieces.encode("red"), EOS, *pieces.encode("USER: blue")]
    assert ids_of(read(tmp_path, legacy=legacy), "red</s>USER: blue") == expected


def test_text_behind_an_end_goes_on_in_the_newer_way(tmp_path: Path, pieces: Any) -> None:
    before, behind = pieces.encode_as_pieces("red"), pieces.encode_as_pieces("USER: blue")
    assert behind[0] == "▁"  # the dummy prefix, a piece of its own in this model
    expected = [BOS, *map(pieces.piece_to_id, before), EOS, *map(pieces.piece_to_id, behind[1:])]
    assert ids_of(read(tmp_path, legacy=False), "red</s>USER: blue") == expected


def test_a_blank_behind_an_end_is_kept_in_the_newer_way(tmp_path: Path, pieces: Any) -> None:
    expected = [BOS, *pieces.encode("red"), EOS, *pieces.encode("blue")]
    assert ids_of(read(tmp_path, legacy=False), "red</s> blue") == expected


def test_a_special_token_at_the_beginning_gets_no_prefix(tmp_path: Path) -> None:
    assert ids_of(read(tmp_path, legacy=False), "</s>")[:2] == [BOS, EOS]


def test_pieces_of_a_prompt_are_encoded_alone_between_pictures(tmp_path: Path, pieces: Any) -> None:
    """Each part has a dummy prefix of its own, and only the first its mark of a beginning."""
    tokenizer = PromptTokenizer(read(tmp_path), IMAGE)
    ids = ids_of(tokenizer, "USER: <image><image>\nred<image>")
    parts = [pieces.encode("USER: "), pieces.encode("\nred")]
    assert ids == [BOS, *parts[0], IMAGE, IMAGE, *parts[1], IMAGE]
    assert pieces.id_to_piece(parts[1][0]) == "▁"


def test_tokenizer_without_a_beginning_loses_no_ids_between_pictures(tmp_path: Path) -> None:
    """The tokenizer of Yi: no mark of a beginning, no dummy prefix."""
    settings = {"add_bos_token": False, "dummy_prefix": False, "legacy": None}
    tokenizer = PromptTokenizer(read(tmp_path, **settings), IMAGE)
    model = sentencepiece_model(dummy_prefix=False)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert ids_of(tokenizer, "red<image>\nblue") == [
        *pieces.encode("red"),
        IMAGE,
        *pieces.encode("\nblue"),
    ]


def test_added_tokens_are_split_off_first(tmp_path: Path, pieces: Any) -> None:
    added = {
        str(num_pieces()): {"content": "<|im_end|>", "special": True},
        str(num_pieces() + 1): {"content": "<|im_start|>", "special": True},
    }
    tokenizer = read(tmp_path, legacy=None, added_tokens_decoder=added)
    expected = [BOS, num_pieces() + 1, *pieces.encode("user\nred"), num_pieces()]
    assert ids_of(tokenizer, "<|im_start|>user\nred<|im_end|>") == expected
    assert len(tokenizer) == num_pieces() + 2


def test_added_token_takes_the_blanks_that_belong_to_it(tmp_path: Path, pieces: Any) -> None:
    added = {str(num_pieces()): {"content": "<x>", "lstrip": True, "rstrip": True}}
    tokenizer = read(tmp_path, legacy=True, added_tokens_decoder=added)
    expected = [BOS, *pieces.encode("red"), num_pieces(), *pieces.encode("blue")]
    assert ids_of(tokenizer, "red  <x>  blue") == expected


def test_older_files_name_added_tokens_too(tmp_path: Path) -> None:
    write_json(tmp_path / "added_tokens.json", **{"<x>": num_pieces()})
    write_json(tmp_path / "special_tokens_map.json", pad_token={"content": "[PAD]"})
    tokenizer = read(tmp_path, pad_token=None)
    assert ids_of(tokenizer, "<x>")[-1] == num_pieces()
    assert ids_of(tokenizer, "[PAD]")[-1] == num_pieces() + 1


def test_new_tokens_get_the_next_ids_once(tmp_path: Path) -> None:
    tokenizer = read(tmp_path)
    tokenizer.add_tokens(["<im_patch>", "<im_start>", "</s>"])
    tokenizer.add_tokens(["<im_start>", "<im_end>"])
    assert len(tokenizer) == num_pieces() + 3
    assert ids_of(tokenizer, "<im_end>")[-1] == num_pieces() + 2


def streamed(tokenizer: Any, ids: list[int]) -> str:
    detokenizer = Detokenizer(PromptTokenizer(tokenizer, IMAGE))
    return "".join(detokenizer.add(token)[0] for token in ids) + detokenizer.flush()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", ["it is red.", "  two blanks", "é☂ and\nmore", "▁", "é☂" * 99])
def test_text_comes_back_piece_by_piece(tmp_path: Path, text: str, legacy: bool) -> None:
    tokenizer = read(tmp_path, legacy=legacy)
    ids = ids_of(tokenizer, text)[1:]
    assert streamed(tokenizer, [*ids, EOS]) == text.replace("▁", " ").lstrip()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_any_tokens_come_back_as_from_a_whole_decoding(
    tmp_path: Path, seed: int, fast: bool
) -> None:
    """Bytes that are no character, blanks at the beginning, special tokens in between."""
    write_tokenizer(tmp_path)
    tokenizer = read_tokenizer(tmp_path, fast=fast)
    ids = random.Random(seed).choices(range(num_pieces()), k=300)
    whole = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
    assert streamed(tokenizer, ids) == whole.lstrip()


def test_bytes_that_are_no_character_are_lost_as_the_original_loses_them(tmp_path: Path) -> None:
    """SentencePiece keeps what is a character beside them, the Rust tokenizer nothing."""
    write_tokenizer(tmp_path)
    for fast, expected in ((False, "\ufffdA"), (True, "\ufffd\ufffd")):
        tokenizer = read_tokenizer(tmp_path, fast=fast)
        ids = [tokenizer.backend_tokenizer.token_to_id(name) for name in ("<0xC3>", "<0x41>")]
        assert streamed(tokenizer, ids) == expected


def test_mistrals_tokenizer_has_the_older_way_whatever_its_settings_say(tmp_path: Path) -> None:
    older = ids_of(read(tmp_path, legacy=True), "red</s>USER")
    write_tokenizer(tmp_path, legacy=False)
    assert ids_of(read_tokenizer(tmp_path, fast=True), "red</s>USER") == older


def test_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        read_tokenizer(tmp_path)


def test_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="broken"):
        read_tokenizer(tmp_path)
