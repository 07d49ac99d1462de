"""Where settings come from: flag > environment > config file > default."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.conftest import Cli

Write = Callable[[str], Path]


def test_settings_take_the_flag_then_the_variable_then_the_file(
    cli: Cli, config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file("temperature = 0.1\ntop-k = 1\ntop_p = 0.1")
    monkeypatch.setenv("VLMCHAT_TEMPERATURE", "0.2")
    monkeypatch.setenv("VLMCHAT_TOP_K", "2")
    cli("chat", "-p", "x", "--temperature", "0.3")
    params = cli.backend.params[0]
    assert (params.temperature, params.top_k, params.top_p) == (0.3, 2, 0.1)


def test_settings_of_the_chat_table_win_over_those_above_it(cli: Cli, config_file: Write) -> None:
    config_file("seed = 1\ntop-k = 1\n[chat]\nseed = 2")
    cli("chat", "-p", "x")
    assert (cli.backend.params[0].seed, cli.backend.params[0].top_k) == (2, 1)


def test_settings_know_the_other_names_of_an_option(cli: Cli, config_file: Write, png: str) -> None:
    config_file(f"image-file = [{png!r}]\nno-markdown = true")
    cli("chat", "-p", "x")
    assert len(cli.backend.seen[0].images) == 1
    assert "markdown = false" in cli("config").out


def test_settings_take_one_value_per_line_from_a_variable(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMCHAT_PROMPT", "What is it?\nWhere is it?")
    assert cli("chat").out == "You said: What is it?\nYou said: Where is it?\n"


def test_flag_turns_a_switch_of_the_file_off(cli: Cli, config_file: Write) -> None:
    config_file("load-4bit = true")
    cli("chat", "-p", "x", "--no-load-4bit")
    assert cli.loaded[0].quantization is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(
            "temprature = 1", "unknown setting 'temprature'; is it 'temperature'?", id="key"
        ),
        pytest.param("[chatt]\nseed = 1", "unknown setting 'chatt'", id="table"),
        pytest.param('temperature = "hot"', "temperature is 'hot'; it must be a number", id="text"),
        pytest.param("seed = 1.5", "seed is 1.5; it must be a whole number", id="fraction"),
        pytest.param("load-4bit = 1", "load-4bit is 1; it must be true or false", id="switch"),
        pytest.param("system = 1", "system is 1; it must be a text", id="number"),
        pytest.param('stop = ["a", 1]', "stop is 1; it must be a text", id="item"),
        pytest.param("chat = 1", "'chat' must be a table", id="no-table"),
        pytest.param("seed = ", "cannot read", id="not-toml"),
    ],
)
def test_settings_name_file_and_key_when_the_file_is_wrong(
    cli: Cli, config_file: Write, text: str, words: str
) -> None:
    path = config_file(text)
    run = cli("chat", "-p", "x")
    assert run.code == 2
    assert str(path) in run.err
    assert words in run.err
    assert run.err.count("\n") == 1


def test_settings_name_the_file_when_typer_refuses_its_value(cli: Cli, config_file: Write) -> None:
    path = config_file('dtype = "float8"')
    assert f"--dtype (set in {path}): 'float8' is not one of" in cli("chat", "-p", "x").err


@pytest.mark.parametrize("variable", ["XDG_CONFIG_HOME", "XDG_STATE_HOME"])
def test_settings_say_what_to_set_when_there_is_no_home(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """In a container, a user without a home met an internal error."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    run = cli("chat", "-p", "x")
    assert (run.code, run.err) == (
        2,
        f"vlmchat: you have no home directory; set HOME or {variable}\n",
    )


def test_help_is_shown_when_the_config_file_is_broken(cli: Cli, config_file: Write) -> None:
    config_file("seed = ")
    assert cli("chat", "--help").code == 0


def test_settings_complain_of_a_missing_file_only_when_it_was_asked_for(cli: Cli) -> None:
    assert cli("chat", "-p", "x").code == 0
    run = cli("chat", "-p", "x", "--config", "no.toml")
    assert (run.code, run.err) == (2, "vlmchat: cannot read no.toml: No such file or directory\n")


def test_config_shows_each_value_with_its_origin(
    cli: Cli, config_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file("top-k = 5")
    monkeypatch.setenv("VLMCHAT_SEED", "7")
    shown = json.loads(cli("config", "--json").out)
    assert shown["file"] == str(path)
    assert shown["settings"]["top-k"] == {"value": 5, "origin": "file", "place": str(path)}
    assert shown["settings"]["seed"] == {
        "value": 7,
        "origin": "environment",
        "place": "VLMCHAT_SEED",
    }
    assert shown["settings"]["top-p"] == {"value": 1.0, "origin": "default", "place": None}


def test_config_prints_a_config_file_that_means_the_same(cli: Cli, config_file: Write) -> None:
    config_file('stop = ["a \\"b\\"", "é\\n"]\nseed = 3')
    text = cli("config").out
    assert tomllib.loads(text)["stop"] == ['a "b"', "é\n"]
    config_file(text)
    assert tomllib.loads(cli("config").out) == tomllib.loads(text)
