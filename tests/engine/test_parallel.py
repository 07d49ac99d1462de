"""A model shared by two processes on the CPU, started as users start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHAPES = Path(__file__).parents[2] / "examples" / "shapes.png"
QUESTIONS = ("Describe the image.", "What colour is the star?")


def _chat(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlmchat", "chat", "--model-path", "demo", "--device", "cpu"]
    asked = [word for question in QUESTIONS for word in ("-p", question)]
    more = ["--json", "--temperature", "0", "--image", str(SHAPES), *asked, *options]
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=280)


def _answers(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["answer"] for line in done.stdout.splitlines()]


def test_shared_model_gives_the_tokens_of_the_whole_one() -> None:
    whole = _answers(_chat("--dtype", "float32"))
    assert len(whole) == len(QUESTIONS)
    assert _answers(_chat("--dtype", "float32", "--tensor-parallel", "2")) == whole


@pytest.mark.parametrize(
    ("options", "told"),
    [
        pytest.param(("--tensor-parallel", "2", "--load-4bit"), "not quantised", id="quantised"),
        pytest.param(("--tensor-parallel", "7"), "divisible", id="heads"),
    ],
)
def test_shared_model_is_refused_in_one_line(options: tuple[str, ...], told: str) -> None:
    done = _chat(*options)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
