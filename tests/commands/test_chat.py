"""`vlmchat chat` without a terminal: what is asked, what is printed, how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.conftest import Cli
from tests.fakes import ScriptedBackend
from vlmchat.config import ModelConfig
from vlmchat.engine.engine import Engine
from vlmchat.errors import OutOfMemory
from vlmchat.request import Grammar, SamplingParams


def test_chat_prints_the_answer_only_when_stdout_is_no_terminal(cli: Cli, png: str) -> None:
    cli.backend.answers = ["A **red** square."]
    run = cli("chat", "--image", png, "-p", "What is it?")
    assert (run.code, run.out, run.err) == (0, "A **red** square.\n", "")
    assert [image.source for image in cli.backend.seen[0].images] == [png]


def test_chat_says_on_stderr_that_an_answer_was_cut(cli: Cli) -> None:
    run = cli("chat", "-p", "a b c", "--max-new-tokens", "3")
    assert run.out == "You said: a\n"
    assert run.err == "(cut at --max-new-tokens 3)\n"


def test_chat_leaves_notes_of_loading_on_stderr_in_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = "note: " + "x " * 100 + "end"

    def load(
        config: ModelConfig, progress: Callable[[str], None], *limits: object
    ) -> ScriptedBackend:
        progress("loading")
        progress(note)
        return cli.backend

    monkeypatch.setattr(Engine, "load", load)
    assert cli("chat", "--model-path", "demo", "-p", "hi").err.splitlines() == [note]


def test_chat_asks_one_turn_after_the_other_when_prompts_are_repeated(cli: Cli, png: str) -> None:
    cli.backend.answers = ["one", "two"]
    assert cli("chat", "--image-file", png, "-p", "first", "-p", "second").out == "one\ntwo\n"
    assert [turn.answer for turn in cli.backend.seen[1].turns] == ["one"]
    assert len(cli.backend.seen[1].images) == 1


def test_chat_takes_the_whole_of_stdin_as_one_question(cli: Cli) -> None:
    cli("chat", stdin="what is\nthis? é\n".encode())
    assert cli.backend.seen[0].pending is not None
    assert cli.backend.seen[0].pending.text == "what is\nthis? é"


def test_chat_ignores_stdin_when_a_prompt_is_given(cli: Cli) -> None:
    assert cli("chat", "-p", "hello", stdin=b"not read").out == "You said: hello\n"


def test_chat_reads_a_picture_from_stdin(cli: Cli, png: str) -> None:
    with open(png, "rb") as file:
        run = cli("chat", "--image", "-", "-p", "what?", "--json", stdin=file.read())
    assert json.loads(run.out)["images"][0]["width"] == 8


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        pytest.param(["--image", "-"], b"x", 2, "give the question with -p", id="both-on-stdin"),
        pytest.param(["--image", "-", "-p", "x"], None, 2, "is a terminal", id="picture-on-tty"),
        pytest.param(["--image", "-", "--image", "-", "-p", "x"], b"", 2, "twice", id="two-stdins"),
        pytest.param(["--stream", "-p", "x"], None, 2, "--json", id="stream-without-json"),
        pytest.param([], None, 2, "needs a terminal", id="chat-into-a-pipe"),
        pytest.param(["--session", "a", "--continue"], b"x", 2, "choose one", id="two-sessions"),
        pytest.param(["--load-4bit", "--load-8bit", "-p", "x"], None, 2, "choose", id="4-and-8"),
        pytest.param(
            ["--load-4bit", "--quantization", "int8", "-p", "x"], None, 2, "choose", id="4-and-int8"
        ),
        pytest.param(["--temperature", "-1", "-p", "x"], None, 2, "--temperature", id="range"),
        pytest.param(["--device", "gpu", "-p", "x"], None, 2, "'gpu' is none of", id="device"),
        pytest.param(["--max-new-tokens", "4096", "-p", "x"], None, 2, "no room", id="no-room"),
        pytest.param([], b" \n", 66, "no question", id="empty-stdin"),
        pytest.param(["-p", ""], None, 66, "no question", id="empty-prompt"),
        pytest.param([], b"\xff\xd8\xff", 65, "UTF-8", id="binary-stdin"),
        pytest.param(["--image", "no.png", "-p", "x"], None, 66, "no.png", id="no-such-picture"),
    ],
)
def test_chat_refuses_in_one_line_when_input_is_wrong(
    cli: Cli, arguments: list[str], stdin: bytes | None, code: int, words: str
) -> None:
    run = cli("chat", *arguments, stdin=stdin)
    assert run.code == code
    assert run.err.startswith("vlmchat: ")
    assert run.err.count("\n") == 1
    assert words in run.err
    assert run.out == ""


def test_chat_looks_at_pictures_before_it_loads_a_model(cli: Cli) -> None:
    cli("chat", "--image", "no.png", "-p", "x")
    assert cli.loaded == []


def test_chat_json_is_one_object_per_turn_with_the_documented_keys(cli: Cli, png: str) -> None:
    run = cli("chat", "--image", png, "-p", "a", "-p", "b", "--json")
    first, second = map(json.loads, run.out.splitlines())
    assert (first["schema"], first["type"], second["answer"]) == (1, "answer", "You said: b")
    assert second["usage"].keys() == first["usage"].keys()
    assert second["usage"]["cached_tokens"] > 0


def test_chat_json_stream_sends_the_answer_in_pieces_before_the_object(cli: Cli) -> None:
    cli.backend.answers = ["one two"]
    out = cli("chat", "-p", "a", "--json", "--stream").out
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["type"] for line in lines] == ["delta", "delta", "answer"]
    assert "".join(line["text"] for line in lines[:-1]) == lines[-1]["answer"]


def test_chat_json_reports_an_error_as_an_object_on_stderr(cli: Cli) -> None:
    error = json.loads(cli("chat", "--image", "no.png", "-p", "x", "--json").err)["error"]
    assert error["code"] == "image_not_found"
    assert error["exit_code"] == 66
    assert "no.png" in error["message"]


def test_chat_wants_a_question_when_json_is_asked_for_at_a_terminal(cli: Cli) -> None:
    run = cli("chat", "--json")
    assert run.code == 2
    assert "give the question with -p" in json.loads(run.err)["error"]["message"]


def test_chat_ends_at_the_first_turn_that_fails_when_several_are_asked(cli: Cli) -> None:
    cli.backend.answers = ["one", OutOfMemory("out of memory"), "three"]
    run = cli("chat", "-p", "a", "-p", "b", "-p", "c", "--json")
    assert [json.loads(line)["answer"] for line in run.out.splitlines()] == ["one"]
    assert run.code == 71


def test_chat_passes_sampling_and_model_options_on(cli: Cli) -> None:
    cli("chat", "-p", "x", "--model-path", "demo", "--load-4bit", "--device", "cpu", "--seed", "7",
        "--top-k", "3", "--top-p", "0.5", "--temperature", "0", "--stop", "a b", "--stop", "c",
        "--max-new-tokens", "9", "--system", "Be brief.")  # fmt: skip
    assert cli.backend.params == [SamplingParams(0.0, 0.5, 3, 9, 7, ("a b", "c"))]
    assert (cli.loaded[0].path, cli.loaded[0].quantization) == ("demo", "4bit")
    assert cli.backend.seen[0].system == "Be brief."


def test_chat_shows_the_rendered_prompt_when_debug_is_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(cli.backend), "render", lambda *_: "USER: x", raising=False)
    assert "USER: x\n" in cli("chat", "-p", "x", "--debug").err


def test_chat_renders_markdown_into_a_pipe_when_colours_are_forced(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    cli.backend.answers = ["a **b**", "a **b**"]
    assert "\x1b[1m" in cli("chat", "-p", "x").out
    assert cli("chat", "-p", "x", "--no-markdown").out == "a **b**\n"


def test_chat_asks_for_the_form_that_a_schema_says(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "object"}')
    cli("chat", "-p", "x", "--schema", str(tmp_path / "s.json"))
    cli("chat", "-p", "x", "--json-object")
    forms = [params.grammar for params in cli.backend.params]
    assert forms == [Grammar("json_schema", '{"type": "object"}'), Grammar("json_object", "")]


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_chat_refuses_a_schema_that_is_none_before_a_model_is_loaded(
    cli: Cli, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "s.json").write_text(content)
    run = cli("chat", "-p", "x", "--schema", str(tmp_path / "s.json"))
    assert (run.code, cli.loaded) == (2, [])
    assert "--schema" in run.err
