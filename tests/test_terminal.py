"""The chat in a real terminal: tmux holds the screen, a scripted backend gives the answers."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes import picture

pytestmark = [
    pytest.mark.terminal,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux"),
]
ROOT = Path(__file__).parents[1]
DEADLINE_S = 30.0
HINT = "a question, a picture's path"
LONG = " ".join(f"word{number}" for number in range(400))


class Screen:
    """One terminal of 80×24 in a tmux server of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._socket = f"vlmchat-test-{os.getpid()}-{state.name}"

        self.tmux("new-session", "-d", "-x", "80", "-y", "24", "sleep 600")

    def tmux(self, *arguments: str) -> str:
        command = ["tmux", "-L", self._socket, "-f", "/dev/null", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def start(self, *arguments: str, term: str = "screen-256color") -> None:
        """Run the chat, and wait until it is ready for a line."""
        chat = [sys.executable, "-m", "tests.scripted_chat", str(self.state), *arguments]
        variables = [f"PYTHONPATH={ROOT / 'src'}:{ROOT}", f"TERM={term}"]
        command = shlex.join(["env", "-u", "COLUMNS", "-u", "LINES", *variables, *chat])
        script = f"{command}; echo ended with $?; exec sleep 600"
        self.tmux("respawn-pane", "-k", "-c", str(ROOT), script)
        self.tmux("clear-history")  # of a chat before this one
        self.wait(lambda text: "\n>" in text)

    def type(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def paste(self, text: str) -> None:
        """As a terminal pastes: bracketed."""
        self.tmux("set-buffer", text)
        self.tmux("paste-buffer", "-p")

    def text(self) -> str:
        """The screen and all that scrolled off it, rows without trailing spaces."""
        return self.tmux("capture-pane", "-p", "-S", "-")

    def wait(self, condition: Callable[[str], bool]) -> str:
        """The text once it meets the condition."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition(text := self.text()):
            assert time.monotonic() < deadline, f"not within {DEADLINE_S} s:\n{text}"
            time.sleep(0.02)
        return text

    def wait_for(self, *words: str) -> str:
        return self.wait(lambda text: all(word in text for word in words))

    def kill(self) -> None:
        subprocess.run(["tmux", "-L", self._socket, "kill-server"], capture_output=True)


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    screen = Screen(tmp_path)
    try:
        yield screen
    finally:
        screen.kill()


def test_terminal_streams_markdown_and_leaves_one_copy_of_it(screen: Screen) -> None:
    answer = "# Red\n\n" + LONG + "\n\n1. one\n2. two [b]\n\n```python\nx = 1\n```\n\nthe end"
    screen.start("--delay", "0.002", "--answer", answer)
    screen.type("What is it?", "Enter")
    text = screen.wait_for("the end", "tok/s")
    assert text.split().count("word0") == 1
    assert [word for word in text.split() if word.startswith("word")] == LONG.split()
    assert "  1 one\n  2 two [b]\n\n x = 1\n\nthe end\n" in text


def test_terminal_ctrl_c_stops_the_answer_and_the_next_question_works(screen: Screen) -> None:
    screen.start("--delay", "0.05", "--answer", LONG)
    screen.type("What is it?", "Enter")
    screen.wait_for("word9")
    screen.type("C-c", "C-c", "C-c")
    screen.wait_for("(stopped)", HINT)
    screen.type("and now?", "Enter")
    text = screen.wait_for("You said: and now?")
    assert "word399" not in text
    assert text.count("(stopped)") == 1
    assert "^C" not in text


def test_terminal_takes_keys_pressed_during_an_answer_for_the_next_line(screen: Screen) -> None:
    screen.start("--delay", "0.01", "--answer", " ".join(["word"] * 50))
    screen.type("What is it?", "Enter")
    screen.wait_for("word word")
    screen.type("Enter", "Enter", "and now?", "Enter")
    assert "ended" not in screen.wait_for("You said: and now?")


def test_terminal_takes_several_lines_as_one_message(screen: Screen) -> None:
    screen.start()
    screen.type("one\\", "Enter", "two", "M-Enter", "three", "Enter")
    screen.wait_for("You said: one two three")


def test_terminal_takes_a_pasted_text_as_one_message(screen: Screen) -> None:
    screen.start()
    screen.paste("first line\nsecond line")
    screen.type("Enter")
    screen.wait_for("You said: first line second line")


@pytest.mark.parametrize(
    "keys", [("Enter",), ("C-d",), ("/exit", "Enter")], ids=["empty line", "Ctrl-D", "/exit"]
)
def test_terminal_ends_the_chat(screen: Screen, keys: tuple[str, ...]) -> None:
    screen.start()
    screen.type(*keys)
    screen.wait_for("ended with 0")


def test_terminal_ctrl_c_clears_the_line_then_tells_how_to_end(screen: Screen) -> None:
    screen.start()
    screen.type("not this", "C-c")
    screen.wait_for(HINT)
    screen.type("C-c")
    assert "not this" not in screen.wait_for("ends the chat)")


def test_terminal_survives_a_bad_picture(screen: Screen, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    screen.start()
    screen.type(f"/image {tmp_path}/bad.png", "Enter")
    screen.wait_for("bad.png is text,")
    screen.type("still there?", "Enter")
    screen.wait_for("You said: still there?")


def test_terminal_attaches_and_shows_a_dropped_picture(screen: Screen, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(picture(size=(80, 60)).data)
    screen.start()
    screen.paste(f"{tmp_path}/red.png")
    screen.type("Enter")
    screen.wait_for("picture 1:", "▀", "(1 picture) >")


def test_terminal_resumes_after_kill_9_in_mid_answer(screen: Screen) -> None:
    screen.start("--delay", "0.05", "--answer", "A circle.", "--answer", LONG)
    screen.type("What is it?", "Enter")
    screen.wait_for("A circle.", "tok/s")
    screen.type("And its colour?", "Enter")
    screen.wait_for("word9")
    os.kill(int((screen.state / "pid").read_text()), signal.SIGKILL)
    screen.wait_for("ended with 137")
    screen.start()
    text = screen.wait(lambda text: text.rstrip().endswith("> And its colour?"))
    assert "> What is it?\nA circle.\nthe last question has no answer yet" in text


def test_terminal_draws_right_after_its_width_changed(screen: Screen) -> None:
    screen.start("--delay", "0.005", "--answer", LONG)
    screen.type("What is it?", "Enter")
    screen.wait_for("word60")
    screen.tmux("resize-window", "-x", "50", "-y", "20")
    screen.wait_for("word100")
    screen.tmux("resize-window", "-x", "70", "-y", "24")
    text = screen.wait_for("word399", "tok/s")
    # What the terminal broke and pushed into its scrollback cannot be taken back.
    assert [word for word in text.split() if word.startswith("word")][-400:] == LONG.split()


def test_terminal_works_where_it_is_dumb(screen: Screen) -> None:
    screen.start(term="dumb")
    screen.type("plain?", "Enter")
    screen.wait(lambda text: "You said: plain?" in text and text.count("\n>") == 2)
    screen.type("Enter")
    screen.wait_for("ended with 0")
