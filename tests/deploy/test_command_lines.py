"""Every line of vlmchat in docs/deploy.md and deploy/ is one that the program takes."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
import typer

from tests.deploy.command_lines import COMPOSE, DEPLOY, PAGE, lines, of_page, parse, variables

LINES = list(lines())


@pytest.mark.parametrize("arguments", [a for _, a in LINES], ids=[where for where, _ in LINES])
def test_command_line_is_one_that_the_program_takes(arguments: list[str]) -> None:
    with suppress(typer.Exit):  # what --help and --version end in
        parse(arguments)


def test_command_lines_are_found_everywhere() -> None:
    asked = {arguments[0] for _, arguments in LINES}
    assert asked >= {"controller", "worker", "web", "status", "chat", "models", "cluster"}
    assert len(LINES) > 20


@pytest.mark.parametrize(
    "arguments", [["worker", "--no-such-option"], ["worker", "--port", "x"], ["no-such-command"]]
)
def test_parse_refuses_what_the_program_refuses(arguments: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such|valid integer"):
        parse(arguments)


def test_of_page_reads_blocks_and_text() -> None:
    text = (
        "```sh\nA=1 vlmchat web \\\n  --port 1 | tee log # said\n```\nor `vlmchat status --json`,\n"
    )
    text += "```\ndocker build -t vlmchat:cpu .\nkubectl exec -n vlmchat a -- vlmchat status\n```\n"
    assert list(of_page(text)) == [["web", "--port", "1"], ["status"], ["status", "--json"]]


@pytest.mark.parametrize(
    "path", [PAGE, *COMPOSE, *sorted(DEPLOY.rglob("*.*"))], ids=lambda path: path.name
)
def test_variables_are_ones_that_the_program_reads(path: Path) -> None:
    if path.is_file():
        named = set(re.findall(r"\bVLMCHAT_[A-Z0-9_]*[A-Z0-9]", path.read_text("utf-8")))
        assert named - variables() == set()
