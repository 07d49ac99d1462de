"""Answers are graded by meaning: the words that carry information, sentence by sentence."""

from __future__ import annotations

import re

from tools.demo.questions import NUMBERS
from tools.demo.scenes import COLORS, KINDS

_WORDS = (
    *COLORS,
    *KINDS,
    *NUMBERS,
    *("small", "large", "larger", "same", "nothing", "object", "yes", "not"),
    *("first", "second", "both", "neither", "above", "below"),
    *("top", "bottom", "left", "right", "center", "--model-path", "--image"),
)
_PATTERN = re.compile(
    r"(?<![\w-])("
    + "|".join(map(re.escape, sorted(_WORDS, key=len, reverse=True)))
    + r")s?(?![\w-])"
)


def meaning(answer: str) -> list[str]:
    """The telling words of every sentence; the order of the sentences does not matter."""
    text = answer.lower().replace("centre", "center").replace("in the picture", "")
    text = text.replace("--image or /image", "--image")
    sentences = re.split(r"[.;]\s+|[.;]$", text)
    found = [" ".join(_PATTERN.findall(sentence)) for sentence in sentences]
    return sorted(words for words in found if words)


def right(answer: str, expected: str) -> bool:
    """Whether both say the same thing."""
    return meaning(answer) == meaning(expected)
