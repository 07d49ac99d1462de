"""`vlmchat chat` in a pseudo-terminal: the interactive chat begins, goes on and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pexpect
import pytest

from tests.commands.conftest import ROOT

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
    process = spawn()
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
