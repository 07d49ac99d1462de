"""The whole command line: help, versions, usage errors, completion, signals, pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.conftest import Cli
from vlmchat import __version__

HEAVY = ("torch", "transformers", "PIL", "prompt_toolkit", "httpx2", "huggingface_hub", "numpy")
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--help"], id="help"),
        pytest.param(["--version"], id="version"),
        pytest.param(["chat", "--help"], id="chat-help"),
        pytest.param(["chat", "--temperature", "hot"], id="bad-value"),
        pytest.param(["chat", "--temprature", "1"], id="unknown-flag"),
        pytest.param(["chat", "--load-4bit", "--load-8bit", "-p", "x"], id="contradiction"),
        pytest.param(["config"], id="config"),
    ],
)
def test_main_imports_nothing_heavy_when_no_model_is_needed(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom vlmchat.commands import main\n"
        f"sys.argv = ['vlmchat', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_main_imports_the_one_command_that_is_asked_for() -> None:
    script = (
        "import sys; from vlmchat.commands import command\n"
        "command('chat').main(['chat', '--help'], standalone_mode=False)\n"
        "there = [f'vlmchat.commands.{name}' in sys.modules for name in ('chat', 'web')]\n"
        "sys.exit(there != [True, False])"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=-1).returncode == 0


def test_version_is_one_line(cli: Cli) -> None:
    assert cli("--version").out == f"vlmchat {__version__}\n"


def test_main_shows_help_on_stderr_when_no_command_is_given(cli: Cli) -> None:
    run = cli()
    assert (run.code, run.out) == (2, "")
    assert "Usage: vlmchat" in run.err


def test_usage_error_is_one_line_with_a_hint(cli: Cli) -> None:
    run = cli("chat", "--temprature", "1")
    assert run.code == 2
    assert run.err.startswith("vlmchat: no such option: --temprature")
    assert run.err.count("\n") == 1
    assert "--temperature" in run.err


@pytest.mark.parametrize("asked", ["flag", "variable"])
def test_usage_error_is_an_object_where_json_is_asked_for(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    if asked == "variable":
        monkeypatch.setenv("VLMCHAT_JSON", "1")
    run = cli("chat", *(["--json"] if asked == "flag" else []), "--temprature", "1")
    assert json.loads(run.err)["error"]["code"] == "usage"


def test_usage_error_names_the_variable_when_the_value_came_from_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMCHAT_DTYPE", "float8")
    assert cli("chat").err.startswith("vlmchat: --dtype (set in VLMCHAT_DTYPE): 'float8' is not")


def test_help_lists_every_option_with_its_variable(cli: Cli) -> None:
    text = " ".join(cli("chat", "--help").out.split())
    for flag in ("--model-path", "--image, --image-file", "--load-4bit", "--max-new-tokens"):
        assert flag in text
    assert "VLMCHAT_MODEL_PATH" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("vlmchat chat --model-path dem", ["demo"], id="model"),
        pytest.param("vlmchat chat --device cu", ["cuda"], id="device"),
        pytest.param("vlmchat chat --dtype fl", ["float32", "float16"], id="dtype"),
        pytest.param("vlmchat chat --conv-mode vicuna", ["vicuna_v1"], id="conv-mode"),
        pytest.param("vlmchat ch", ["chat"], id="command"),
    ],
)
def test_bash_completion_offers_values(words: str, expected: list[str]) -> None:
    assert _completed(words) == expected


def test_bash_completion_offers_sessions(cli: Cli) -> None:
    cli("chat", "--session", "holiday", "-p", "x")
    assert _completed("vlmchat chat --session h") == ["holiday"]


def _completed(words: str) -> list[str]:
    count = str(len(words.split()) - 1)
    env = {"_VLMCHAT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
    command = [sys.executable, "-m", "vlmchat"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, check=True)
    return done.stdout.split()


def test_chat_is_quiet_when_the_reader_goes_away(start: Start) -> None:
    with start("chat", "-p", "count") as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == b"0 1"
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_chat_ends_with_130_after_ctrl_c_and_keeps_what_was_said(start: Start) -> None:
    process = start("chat", "-p", "count", "--json", "--stream")
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert b'"type": "delta"' in first
    assert b'"finish_reason": "cancelled"' in out.splitlines()[-1]
    assert b'"code": "interrupted"' in err
    assert process.returncode == 130


def test_chat_ends_with_143_when_terminated(start: Start) -> None:
    process = start("chat", "-p", "count")
    assert process.stdout is not None
    process.stdout.read(3)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, b"")


def test_config_is_quiet_when_its_reader_has_gone_already() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "vlmchat", "config"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_chat_says_so_when_stdout_cannot_be_written(start: Start) -> None:
    with open("/dev/full", "wb") as full:
        process = start("chat", "-p", "count", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 74
    assert err == b"vlmchat: no space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_chat_ends_with_its_own_code_when_stderr_cannot_be_written(start: Start) -> None:
    with open("/dev/full", "wb") as full:
        process = start("chat", "-p", "x", "--image", "no.png", stderr=full)
        process.communicate(timeout=60)
    assert process.returncode == 66


def test_chat_replaces_what_the_encoding_of_stdout_has_not(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    out, _ = start("chat", "-p", "é☂").communicate(timeout=60)
    assert out == "You said: é?\n".encode("latin-1")


def test_error_object_is_json_in_every_encoding(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    _, err = start("chat", "--json", "-p", "x", "--image", "ünï.png").communicate(timeout=60)
    assert json.loads(err)["error"]["message"] == "ünï.png: no such file"


def test_chat_takes_a_question_that_is_not_utf_8(start: Start) -> None:
    out, _ = start("chat", "-p", os.fsdecode(b"a \xff b")).communicate(timeout=60)
    assert out.decode() == "You said: a � b\n"


def test_chat_says_so_when_stdout_is_closed(start: Start) -> None:
    process = start("chat", "-p", "count", stdout=None, preexec_fn=lambda: os.close(1))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (74, b"vlmchat: standard output is closed\n")


def test_chat_animates_nothing_when_colours_are_forced_into_files(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    _, err = start("chat", "-p", "hello").communicate(timeout=60)
    assert err == b""


def test_main_reports_a_bug_on_one_line_when_debug_is_off(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.backend, "count", lambda _: 1 / 0)
    run = cli("chat", "-p", "hello")
    assert run.code == 70
    assert run.err == (
        "vlmchat: internal error: ZeroDivisionError: division by zero; --debug shows where\n"
    )


def test_main_shows_where_a_bug_is_when_debug_is_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.backend, "count", lambda _: 1 / 0)
    assert "Traceback" in cli("chat", "-p", "hello", "--debug").err
