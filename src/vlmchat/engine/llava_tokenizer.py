"""Text to ids as LLaVA's own code has them: the SentencePiece model itself, piece by piece.

Used by the processor of original checkpoints. transformers 5 turns every tokenizer into a Rust one,
whose ids differ in places (after `</s>`, around added tokens, without a dummy prefix); the slow
tokenizers that LLaVA was trained and run with are done here over the `sentencepiece` package. No
torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders
from tokenizers.models import WordLevel

from vlmchat.engine.hub import read_json
from vlmchat.errors import CheckpointError

BLANK = "▁"  # SentencePiece's sign for a space
# A protobuf message ends as it is continued: normalizer_spec { add_dummy_prefix: false }.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the SentencePiece model, and which blanks around it belong to it."""

    text: str
    lstrip: bool = False
    rstrip: bool = False


@dataclass(slots=True)
class TokenizerSettings:
    """What a checkpoint's JSON files say. legacy, fast: see `SentencePieceTokenizer`."""

    specials: dict[str, str] = field(default_factory=dict)  # by SPECIALS
    others: list[str] = field(default_factory=list)  # special too, without a role
    added: dict[int, AddedToken] = field(default_factory=dict)
    legacy: bool = True
    fast: bool = False
    add_bos: bool = True
    add_eos: bool = False


class SentencePieceTokenizer:
    """What is used of a transformers tokenizer, with the ids of the slow LlamaTokenizer.

    Every stretch between added tokens is encoded by itself. legacy: each gets SentencePiece's
    dummy prefix; otherwise only the text's beginning does. fast: text comes back as from the Rust
    tokenizers, which LLaVA uses for Mistral: bytes that are no UTF-8 are lost one and all.
    Source: behaviour of LlamaTokenizer in transformers 4.37, which LLaVA pins.
    """

    def __init__(self, model: bytes, settings: TokenizerSettings) -> None:
        """model: the bytes of a tokenizer.model."""
        self._settings = settings
        self._pieces = sentencepiece.SentencePieceProcessor(
            model_proto=model if settings.legacy else model + NO_DUMMY_PREFIX
        )
        self._added = dict(settings.added)
        self.all_special_tokens: list[str] = []
        self.add_tokens([*settings.specials.values(), *settings.others])
        self.bos_token = settings.specials.get("bos_token")
        self.eos_token = settings.specials.get("eos_token")
        self._unk_length = len(self._pieces.encode(self._unk))

    @property
    def bos_token_id(self) -> int | None:
        """None where there is no such token."""
        return self._id(self.bos_token) if self.bos_token else None

    @property
    def eos_token_id(self) -> int | None:
        """None where there is no such token."""
        return self._id(self.eos_token) if self.eos_token else None

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """For decoding only: the same ids, and SentencePiece's own way back to text."""
        added = set(self._contents()) - set(self.all_special_tokens)
        tokenizer = tokenizers.Tokenizer(WordLevel(self._vocabulary(), unk_token=self._unk))
        tokenizer.add_special_tokens(self.all_special_tokens)
        if self._settings.fast:
            steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
            tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        else:
            tokenizer.decoder = decoders.Decoder.custom(_PieceDecoder(self._pieces, added))
        return tokenizer

    def __len__(self) -> int:
        return len(self._vocabulary())

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """`{"input_ids": ids}`, with the marks of beginning and end that the checkpoint wants."""
        ids = [self._id(token) for token in self._tokenize(text)]
        if add_special_tokens:
            ids = [*self._edge("bos_token", self._settings.add_bos), *ids]
            ids += self._edge("eos_token", self._settings.add_eos)
        return {"input_ids": ids}

    def add_tokens(self, tokens: Iterable[str]) -> None:
        """Add special tokens; those that the vocabulary lacks get ids from its length on."""
        vocabulary = self._vocabulary()
        for token in tokens:
            if token not in self._contents():
                self._added[vocabulary.setdefault(token, len(vocabulary))] = AddedToken(token)
            if token not in self.all_special_tokens:
                self.all_special_tokens.append(token)
        self._by_text = {token.text: id_ for id_, token in self._added.items()}
        by_length = sorted(filter(None, self._by_text), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, by_length)) + ")")

    @property
    def _unk(self) -> str:
        return self._settings.specials.get("unk_token", "<unk>")

    def _contents(self) -> list[str]:
        return [token.text for token in self._added.values()]

    def _vocabulary(self) -> dict[str, int]:
        size = self._pieces.get_piece_size()
        pieces = {self._pieces.id_to_piece(i): i for i in range(size) if i not in self._added}
        return pieces | {token.text: id_ for id_, token in self._added.items()}

    def _edge(self, role: str, wanted: bool) -> list[int]:
        token = self._settings.specials.get(role)
        return [self._id(token)] if wanted and token else []

    def _id(self, token: str) -> int:
        found = self._by_text.get(token)
        return int(self._pieces.piece_to_id(token)) if found is None else found

    def _tokenize(self, text: str) -> list[str]:
        if self._settings.legacy or not text:
            return self._tokenize_parts(text)
        tokens = self._tokenize_parts(BLANK + text.replace(BLANK, " "))
        if tokens[0] == BLANK and tokens[1:] and tokens[1] in self.all_special_tokens:
            return tokens[1:]
        return tokens

    def _tokenize_parts(self, text: str) -> list[str]:
        """Added tokens as they are, what stands between them in pieces."""
        parts = self._split.split(text)  # text, token, text, token … text
        for place in range(1, len(parts), 2):
            token = self._added[self._by_text[parts[place]]]
            if token.lstrip:
                parts[place - 1] = parts[place - 1].rstrip()
            if token.rstrip:
                parts[place + 1] = parts[place + 1].lstrip()
        return [
            token
            for place, part in enumerate(parts)
            for token in ([part] if place % 2 else self._encode(part) if part else [])
        ]

    def _encode(self, text: str) -> list[str]:
        encode = self._pieces.encode_as_pieces
        if self._settings.legacy or not text.startswith((BLANK, " ")):
            return list(encode(text))
        # A blank at the beginning survives only behind something.
        return list(encode(self._unk + text)[self._unk_length :])


class _PieceDecoder:
    """Pieces back to text, for `tokenizers`, which drops special tokens before."""

    def __init__(self, pieces: Any, added: set[str]) -> None:
        self._pieces = pieces
        self._added = added

    def decode_chain(self, tokens: list[str]) -> list[str]:
        """Added tokens stand apart, by blanks."""
        texts: list[str] = []
        run: list[str] = []
        for token in tokens:
            if token in self._added:
                texts += [self._text(run), token] if run else [token]
                run = []
            else:
                run.append(token)
        if run:
            texts.append(self._text(run))
        return [" ".join(texts)]

    def _text(self, run: list[str]) -> str:
        return str(self._pieces.decode([run[0].removeprefix(BLANK), *run[1:]]))


def read_tokenizer(directory: Path, *, fast: bool = False) -> Any:
    """The tokenizer in `directory`: over its tokenizer.model, else transformers' own.

    fast: the original would take the Rust tokenizer: its tokenizer.json first, and where there is
    none what it makes of tokenizer.model, which is the older way whatever `legacy` says.
    Raises CheckpointError where there is none.
    """
    file = directory / "tokenizer.model"
    if file.is_file() and not (fast and (directory / "tokenizer.json").is_file()):
        settings = read_settings(directory)
        settings.fast, settings.legacy = fast, fast or settings.legacy
        try:
            return SentencePieceTokenizer(file.read_bytes(), settings)
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{file} is broken ({error}); download it again") from error
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{directory} has no tokenizer.model, so it cannot read text")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def read_settings(directory: Path) -> TokenizerSettings:
    """tokenizer_config.json, and the older special_tokens_map.json and added_tokens.json."""
    config = read_json(directory / "tokenizer_config.json")
    newer = config.get("added_tokens_decoder") or {}
    roles = config if newer else config | read_json(directory / "special_tokens_map.json")
    added = {int(id_): _added_token(token) for id_, token in newer.items()}
    if not newer:
        older = read_json(directory / "added_tokens.json")
        added = {id_: AddedToken(token) for token, id_ in older.items()}
    specials = {role: _text(roles.get(role, DEFAULTS.get(role))) for role in SPECIALS}
    legacy = config.get("legacy")
    return TokenizerSettings(
        specials={role: token for role, token in specials.items() if token},
        others=[_text(token) for token in roles.get("additional_special_tokens") or ()],
        added=added,
        legacy=True if legacy is None else bool(legacy),
        add_bos=bool(config.get("add_bos_token", True)),
        add_eos=bool(config.get("add_eos_token", False)),
    )


def _text(token: Any) -> str:
    """A special token stands as a text or as an object."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _added_token(token: Mapping[str, Any]) -> AddedToken:
    return AddedToken(str(token["content"]), bool(token.get("lstrip")), bool(token.get("rstrip")))
