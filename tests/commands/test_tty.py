"""`vlmchat chat` in a pseudo-terminal: the interactive chat begins, goes on and ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from tests.commands.conftest import ROOT
from vlmchat.errors import ModelNotFound, OutOfMemory

Spawn = Callable[..., "pexpect.spawn[str]"]


@pytest.fixture
def spawn(monkeypatch: pytest.MonkeyPatch) -> Spawn:
    """Starts `vlmchat chat` over a scripted model in a terminal of 80 columns."""
    monkeypatch.setenv("TERM", "xterm-256color")

    def start(*arguments: str) -> pexpect.spawn[str]:
        command = ["-m", "tests.commands.scripted", "chat", *arguments]
        return pexpect.spawn(
            sys.executable, command, cwd=str(ROOT), encoding="utf-8", timeout=60, echo=False
        )

    return start


def test_chat_goes_on_with_the_last_session_after_an_interactive_one(spawn: Spawn) -> None:
    first = spawn("--model-path", "demo")
    first.expect("/help")
    first.send("hello\r")
    first.expect("You said: hello")
    first.expect("context")
    first.send("\r")
    first.expect(pexpect.EOF)
    assert first.wait() == 0
    second = spawn("--continue")
    second.expect("You said: hello")
    second.send("\r")
    second.expect(pexpect.EOF)
    assert second.wait() == 0


def test_chat_puts_the_terminal_back_when_terminated(spawn: Spawn) -> None:
    process = spawn("--model-path", "demo")
    process.expect("/help")
    process.send("half a question")
    process.expect("half a question")
    process.kill(15)
    process.expect(pexpect.EOF)
    assert process.wait() == 143
    assert "\x1b[?2004l" in str(process.before)  # bracketed paste is off again


def test_chat_shows_picture_and_questions_when_asked_in_one_shot(spawn: Spawn, png: str) -> None:
    process = spawn("--image", png, "-p", "first", "-p", "second")
    process.expect("▀")
    process.expect("> first")
    process.expect("You said: first")
    process.expect("> second")
    process.expect(pexpect.EOF)
    assert process.wait() == 0


@pytest.fixture
def slow(tmp_path: Path) -> str:
    return _model(tmp_path / "slow")


@pytest.fixture
def broken(tmp_path: Path) -> str:
    return _model(tmp_path / "broken")


def _model(directory: Path) -> str:
    directory.mkdir()
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize(
    ("key", "code"),
    [("\x03", 130), ("\x04", 0), ("\r", 0)],
    ids=["Ctrl-C", "Ctrl-D", "an empty line"],
)
def test_chat_ends_at_once_while_the_model_loads(
    spawn: Spawn, slow: str, key: str, code: int
) -> None:
    process = spawn("--model-path", slow)
    process.expect("a question, a picture")
    process.send(key)
    process.expect(pexpect.EOF, timeout=30)
    assert process.wait() == code


def test_chat_returns_to_the_prompt_when_stopped_while_a_question_waits(
    spawn: Spawn, slow: str
) -> None:
    process = spawn("--model-path", slow)
    process.expect("a question, a picture")
    process.send("Red?\r")
    process.expect("reading tensors")
    process.send("\x03")
    process.expect("stopped")
    process.expect("a question, a picture")
    process.send("\r")
    process.expect(pexpect.EOF)
    assert process.wait() == 0


@pytest.mark.parametrize("typed", ["", "half a question", "a question\r"])
def test_chat_tells_why_the_model_did_not_load(spawn: Spawn, broken: str, typed: str) -> None:
    process = spawn("--model-path", broken)
    process.expect("a question, a picture")
    process.send(typed)
    process.expect("vlmchat: the model needs 9.0 GB on cpu")
    process.expect(pexpect.EOF)
    assert process.wait() == OutOfMemory.exit_code


def test_chat_tells_a_missing_model_before_there_is_a_prompt(spawn: Spawn) -> None:
    process = spawn("--model-path", "./nowhere")
    process.expect(pexpect.EOF)
    assert "no model at ./nowhere" in str(process.before)
    assert "a question, a picture" not in str(process.before)
    assert process.wait() == ModelNotFound.exit_code
