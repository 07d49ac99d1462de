"""`vlmchat web`: options that contradict each other are told before anything is loaded."""

from __future__ import annotations

import pytest

from tests.commands.conftest import Cli


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
