"""`vlmchat batch`: options, files, resuming after any end, exit codes, and a server's answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import ROOT, Cli
from tests.fakes import ScriptedBackend, picture
from tests.openai_server import OpenAIServer
from vlmchat.errors import EngineDead

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs, with three pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in "cab":
        (tmp_path / "photos" / f"{name}.png").write_bytes(picture(color=f"#{ord(name):06x}").data)
    return tmp_path


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(ScriptedBackend(context_length=2048)) as server:
        yield server
        server.shutdown()


def _lines(path: str | Path = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def _ids(path: str | Path = "out.jsonl") -> list[str]:
    return sorted(line["id"] for line in _lines(path))


def _requests(count: int, path: str = "in.jsonl") -> None:
    lines = (json.dumps({"id": str(n), "prompt": f"q{n}"}) + "\n" for n in range(count))
    Path(path).write_text("".join(lines))


def test_batch_captions_the_pictures_of_a_pattern(cli: Cli, folder: Path) -> None:
    run = cli("batch", "--image", "photos/*.png", "-p", "Caption this.", "-o", "out.jsonl")
    assert (run.code, run.out) == (0, "")
    assert run.err.startswith("3 of 3 done · ")
    assert _ids() == ["photos/a.png", "photos/b.png", "photos/c.png"]
    assert {line["answer"] for line in _lines()} == {"You said: Caption this."}


def test_batch_takes_pictures_that_a_shell_has_expanded(cli: Cli, folder: Path) -> None:
    options = ("-p", "x", "-o", "out.jsonl")
    assert cli("batch", *options, "--image", "photos/a.png", "photos/b.png").code == 0
    assert _ids() == ["photos/a.png", "photos/b.png"]


def test_batch_reads_pictures_beside_the_file_of_requests(cli: Cli, folder: Path) -> None:
    Path("photos/in.jsonl").write_text('{"image": "a.png", "prompt": "x"}\n')
    assert cli("batch", "photos/in.jsonl", "-o", "out.jsonl").code == 0
    assert _lines()[0]["images"][0]["source"] == "a.png"


def test_batch_exits_with_1_when_a_request_failed_and_retries_it_when_told(
    cli: Cli, folder: Path
) -> None:
    command = ("batch", "--image", "photos/*.png", "-p", "x", "-o", "out.jsonl")
    whole = Path("photos/b.png").read_bytes()
    Path("photos/b.png").write_bytes(whole[:20])
    run = cli(*command)
    assert run.code == 1
    assert "1 of 3 requests failed" in run.err
    asked = len(cli.backend.seen)
    assert cli(*command).code == 1
    assert len(cli.backend.seen) == asked
    Path("photos/b.png").write_bytes(whole)
    assert cli(*command, "--retry-failed").code == 0
    assert len(cli.backend.seen) == asked + 1
    assert [line["type"] for line in _lines()] == ["answer"] * 3


def test_batch_tells_a_summary_in_json(cli: Cli, folder: Path) -> None:
    _requests(3)
    Path("in.jsonl").write_text(Path("in.jsonl").read_text() + "nope\n")
    run = cli("batch", "in.jsonl", "-o", "out.jsonl", "--json")
    summary = json.loads(run.out)
    assert (summary["type"], summary["model"], summary["requests"]) == ("batch", "scripted", 4)
    assert (summary["answered"], summary["failed"]) == (3, 1)
    assert summary["usage"]["completion_tokens"] == 9
    assert json.loads(run.err.splitlines()[-1])["error"]["code"] == "some_failed"
    again = json.loads(cli("batch", "in.jsonl", "-o", "out.jsonl", "--json").out)
    assert (again["answered"], again["earlier"]) == (0, {"done": 4, "failed": 1})


def test_batch_takes_requests_from_stdin_and_answers_on_stdout(
    folder: Path, server: OpenAIServer
) -> None:
    command = [sys.executable, "-m", "vlmchat", "batch", "-", "-o", "-", "--server", server.url]
    text = b'{"id": "a", "prompt": "x", "image": "photos/a.png"}\n{"id": "b", "prompt": "y"}\n'
    run = subprocess.run(command, input=text, capture_output=True, env=_environment())
    assert run.returncode == 0, run.stderr
    answers = {line["id"]: line["answer"] for line in map(json.loads, run.stdout.splitlines())}
    assert answers == {"a": "You said: x", "b": "You said: y"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        pytest.param(["in.jsonl"], 2, "-o is missing", id="no output"),
        pytest.param(["-o", "x"], 2, "give one file of requests", id="no input"),
        pytest.param(["a", "b", "-o", "x"], 2, "give one file of requests", id="two"),
        pytest.param(["none.jsonl", "-o", "x"], 66, "no such file", id="missing"),
        pytest.param(["in.jsonl", "-o", "in.jsonl"], 2, "both input and output", id="same"),
        pytest.param(["in.jsonl", "-o", "./in.jsonl"], 2, "both input and output", id="alike"),
        pytest.param(["in.jsonl", "-o", "-", "--json"], 2, "both write to stdout", id="stdout"),
        pytest.param(["in.jsonl", "-p", "x", "-o", "x"], 2, "-p goes with --image", id="prompt"),
        pytest.param(["--image", "*.png", "-o", "x"], 66, "no question", id="no prompt"),
        pytest.param(["--image", "*.gif", "-p", "x", "-o", "x"], 66, "no file", id="no picture"),
        pytest.param(["twice.jsonl", "-o", "x"], 65, "two requests have the id 'a'", id="twice"),
        pytest.param(["empty.jsonl", "-o", "x"], 66, "there are no requests", id="empty"),
        pytest.param(["in.jsonl", "-o", "no/x"], 2, "no such folder", id="folder"),
        pytest.param(["in.jsonl", "-o", "photos/a.png"], 65, "line 1 is not an answer", id="other"),
    ],
)
def test_batch_refuses_before_a_model_is_loaded(
    cli: Cli, folder: Path, arguments: list[str], code: int, words: str
) -> None:
    _requests(2)
    Path("twice.jsonl").write_text('{"id": "a", "prompt": "x"}\n' * 2)
    Path("empty.jsonl").write_text("\n")
    run = cli("batch", *arguments)
    assert (run.code, cli.loaded) == (code, [])
    assert words in run.err
    assert len(run.err.splitlines()) == 1


def test_batch_notes_answers_that_belong_to_other_requests(cli: Cli, folder: Path) -> None:
    command = ("batch", "--image", "photos/a.png", "-o", "out.jsonl", "-p")
    cli(*command, "one question")
    run = cli(*command, "another")
    assert "1 of its answers were made for other requests" in run.err
    _requests(1)
    assert "1 of its answers belong to none" in cli("batch", "in.jsonl", "-o", "out.jsonl").err
    assert len(_lines()) == 2


def test_batch_ends_with_the_engines_own_code_when_it_dies(cli: Cli, folder: Path) -> None:
    _requests(3)
    cli.backend.answers = ["one", EngineDead("the engine failed")]
    run = cli("batch", "in.jsonl", "-o", "out.jsonl", "--concurrency", "1")
    assert (run.code, run.err) == (EngineDead.exit_code, "vlmchat: the engine failed\n")
    assert cli("batch", "in.jsonl", "-o", "out.jsonl").code == 0
    assert _ids() == ["0", "1", "2"]


def test_batch_asks_a_server(cli: Cli, folder: Path, server: OpenAIServer) -> None:
    server.api_key = "secret"
    command = ("batch", "--image", "photos/*.png", "-p", "x", "-o", "out.jsonl")
    refused = cli(*command, "--server", server.url)
    assert refused.code == 77
    run = cli(*command, "--server", server.url, "--api-key", "secret")
    assert run.code == 0, run.err
    assert [line["model"] for line in _lines()] == ["m"] * 3
    assert cli.loaded == []


def test_chat_asks_a_server(cli: Cli, server: OpenAIServer, png: str) -> None:
    run = cli("chat", "--server", f"{server.url}/v1", "--image", png, "-p", "a", "-p", "b")
    assert (run.code, run.out, cli.loaded) == (0, "You said: a\nYou said: b\n", [])
    assert len(server.backend.seen[1].turns) == 1


def test_chat_on_a_server_refuses_options_for_a_model_here(cli: Cli, server: OpenAIServer) -> None:
    run = cli("chat", "--server", server.url, "-p", "x", "--load-4bit")
    assert (run.code, "--load-4bit is for a model here" in run.err) == (2, True)


def test_settings_of_other_commands_are_theirs(
    cli: Cli, folder: Path, config_file: Callable[[str], Path]
) -> None:
    config_file("markdown = false\nseed = 1\n[chat]\nsession = 'x'\n[batch]\nconcurrency = 2")
    _requests(1)
    assert cli("batch", "in.jsonl", "-o", "out.jsonl").code == 0
    assert cli.backend.params[0].seed == 1
    config_file("[batch]\nmarkdown = false")
    assert "unknown setting 'markdown'" in cli("batch", "in.jsonl", "-o", "out.jsonl").err


def test_batch_stopped_by_ctrl_c_is_gone_on_with(start: Start, folder: Path) -> None:
    Path("in.jsonl").write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "count"}\n')
    arguments = ("batch", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"))
    process = start(*arguments)
    _wait_for_lines(folder / "out.jsonl", 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"1 of 2 done" in err
    assert b"the same command goes on from here" in err
    assert _ids(folder / "out.jsonl") == ["a"]


def test_batch_ends_quietly_when_the_reader_of_its_answers_leaves(
    start: Start, folder: Path
) -> None:
    _requests(500)
    process = start("batch", str(folder / "in.jsonl"), "-o", "-")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_batch_killed_in_the_middle_answers_each_request_once(tmp_path: Path) -> None:
    """The real program on the demo model; a torn line is added where the kill has left none."""
    for number in range(40):
        shutil.copy(ROOT / "examples" / "shapes.png", tmp_path / f"{number:02}.png")
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "vlmchat", "batch", "--model-path", "demo"]
    command += ["--image", str(tmp_path / "*.png"), "-p", "What is it?", "-o", str(out)]
    process = subprocess.Popen(command, env=_environment(), stderr=subprocess.DEVNULL)
    _wait_for_lines(out, 3)
    process.kill()
    process.wait()
    before = out.read_bytes()[: out.read_bytes().rfind(b"\n") + 1]
    assert before.count(b"\n") < 40
    with out.open("ab") as file:
        file.write(b'{"schema": 1, "type": "ans')
    done = subprocess.run(command, env=_environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(before)
    assert _ids(out) == [str(tmp_path / f"{number:02}.png") for number in range(40)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def _wait_for_lines(path: Path, count: int) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        time.sleep(0.01)
