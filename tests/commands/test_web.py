"""`vlmchat web`: options that contradict each other are told before anything is loaded."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from tests.commands.conftest import Cli
from tests.fakes import ScriptedBackend
from tests.openai_server import OpenAIServer


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model-path", "demo", "--server", "http://x"], "--model-path and --server"),
        (["--model-path", "demo", "--controller-url", "http://x"], "and --controller-url"),
        (["--device", "cpu"], "give --model-path with it"),
        (["--moderate"], "--moderate needs --moderation-url"),
    ],
)
def test_web_refuses_options_that_contradict_each_other(
    cli: Cli, arguments: list[str], told: str
) -> None:
    run = cli("web", *arguments)
    assert run.code == 2
    assert told in run.err
    assert cli.loaded == []


def test_web_sends_the_first_of_the_keys_that_the_variable_holds(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, seen = OpenAIServer(ScriptedBackend()), []

    def run(page: Any, sock: Any, models: Any, *rest: Any) -> None:
        seen.append(models.present())

    server.api_key = "k1"
    monkeypatch.setenv("VLMCHAT_API_KEY", "k1\nk2")
    monkeypatch.setattr(import_module("vlmchat.commands.web"), "_run", run)
    ended = cli("web", "--server", server.url, "--port", "0")
    server.shutdown()
    server.server_close()
    assert (ended.code, seen) == (0, [("m",)])
