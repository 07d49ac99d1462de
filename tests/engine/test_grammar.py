"""Answers in a given form: whatever is drawn, what comes out has it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.original import write_tokenizer
from tests.tiny import make_tokenizer
from vlmchat.engine.detokenizer import Detokenizer
from vlmchat.engine.grammar import Grammars
from vlmchat.engine.llava_tokenizer import read_tokenizer
from vlmchat.errors import InvalidRequest
from vlmchat.request import Grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["star", "square"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "sure": {"type": "boolean"},
    },
    "required": ["shape", "count", "sure"],
    "additionalProperties": False,
}
BY_SCHEMA = Grammar("json_schema", json.dumps(SCHEMA))


def _demo(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(files("vlmchat.demo") / "model"))


def _original(directory: Path) -> Any:
    write_tokenizer(directory)
    return read_tokenizer(directory)


@pytest.fixture(
    scope="module",
    params=[_demo, _original, lambda directory: make_tokenizer()],
    ids=["demo", "sentencepiece", "bytes"],
)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    make: Callable[[Path], Any] = request.param
    return make(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, {tokenizer.eos_token_id})


def _answer(tokenizer: Any, grammars: Grammars, grammar: Grammar, seed: int) -> str | None:
    """Of tokens drawn blindly from those that may follow; None where it did not end in time."""
    random_, mask, detokenizer = random.Random(seed), grammars(grammar), Detokenizer(tokenizer)
    text = ""
    for _ in range(400):
        allowed = mask.mask(len(tokenizer)).nonzero()[0].tolist()
        token = random_.choice(allowed)
        if token == tokenizer.eos_token_id:
            return text + detokenizer.flush()
        text += detokenizer.add(token)[0]
        mask.advance(token)
        if mask.finished:
            return text + detokenizer.flush()
    return None


@pytest.mark.parametrize("seed", range(20))
def test_answer_follows_its_schema(tokenizer: Any, grammars: Grammars, seed: int) -> None:
    text = _answer(tokenizer, grammars, BY_SCHEMA, seed)
    assert text is not None
    told = json.loads(text)
    assert list(told) == ["shape", "count", "sure"]
    assert told["shape"] in ("star", "square")
    assert 0 <= told["count"] <= 20
    assert isinstance(told["sure"], bool)


def test_answer_is_a_json_object(tokenizer: Any, grammars: Grammars) -> None:
    texts = [_answer(tokenizer, grammars, Grammar("json_object", ""), seed) for seed in range(20)]
    ended = [json.loads(text) for text in texts if text is not None]
    assert ended
    assert all(isinstance(told, dict) for told in ended)


def test_answer_follows_a_regex(tokenizer: Any, grammars: Grammars) -> None:
    pattern = "(yes|no), [0-9]{3}"
    text = _answer(tokenizer, grammars, Grammar("regex", pattern), 1)
    assert text is not None
    assert re.fullmatch(pattern, text)


def test_mask_takes_what_must_not_follow_off_the_logits(tokenizer: Any, grammars: Grammars) -> None:
    size = len(tokenizer) + 8  # a vocabulary that is padded
    mask = grammars(BY_SCHEMA)
    logits = mask.allowed(torch.zeros(size))
    allowed = mask.mask(size)
    assert torch.equal(logits == 0, torch.from_numpy(allowed))
    assert 0 < allowed.sum() < 50
    assert not allowed[len(tokenizer) :].any()


def test_mask_refuses_a_token_that_must_not_follow(tokenizer: Any, grammars: Grammars) -> None:
    mask = grammars(BY_SCHEMA)
    forbidden = int((~mask.mask(len(tokenizer))).nonzero()[0][0])
    with pytest.raises(InvalidRequest, match=f"token {forbidden}"):
        mask.advance(forbidden)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", "[]"),
        Grammar("json_schema", '{"type": "colour"}'),
        Grammar("json_schema", '{"$ref": "https://example.com/x.json"}'),
        Grammar("regex", "("),
        Grammar("lark", "start: nowhere"),
        Grammar("regex", "a" * 300_000),
    ],
    ids=lambda grammar: f"{grammar.kind}-{grammar.text[:20]}",
)
def test_grammar_that_is_none_is_refused(grammars: Grammars, grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest) as refused:
        grammars(grammar)
    assert "\n" not in refused.value.message
