"""Option values taken unchecked are those that Typer would have taken, and are refused as by it."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.core import TyperCommand

from vlmchat.commands.plain_values import PlainCommand

ARGUMENTS = [
    [],
    *(
        ["--count", text]
        for text in ("3", "0", "10", "11", "-1", "03", " 3", "1_0", "3.0", "x", "٣")
    ),
    *(["--share", text] for text in ("0.5", "1", "1.5", "-0.5", ".5", "1e-1", "nan", "inf", "5.")),
    ["--name", "a", "--names", "b", "--names", ""],
    ["--kind", "one"],
    ["--kind", "two"],
    ["--kind", "three"],
    ["--loud"],
    ["--upper", "a"],
]


def _outcome(cls: type[TyperCommand], arguments: list[str]) -> Any:
    app, seen = typer.Typer(), []

    def run(
        count: Annotated[int, typer.Option(min=0, max=10)] = 4,
        share: Annotated[float | None, typer.Option(min=0, max=1)] = None,
        name: Annotated[str | None, typer.Option()] = None,
        names: Annotated[list[str], typer.Option()] = [],  # noqa: B006
        kind: Annotated[Literal["one", "two"], typer.Option()] = "one",
        upper: Annotated[str, typer.Option(callback=lambda value: value.upper())] = "b",
        loud: Annotated[bool, typer.Option("--loud")] = False,
    ) -> None:
        seen.append((count, share, name, list(names), kind, upper, loud))

    app.command(cls=cls)(run)
    try:
        typer.main.get_command(app).main(arguments, standalone_mode=False)
    except Exception as error:
        return str(error)
    return seen


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_value_is_what_typer_makes_of_it(arguments: list[str]) -> None:
    assert _outcome(PlainCommand, arguments) == _outcome(TyperCommand, arguments)


def test_error_of_a_picture_is_told_without_pydantic_and_without_an_http_client() -> None:
    script = (
        "import sys\nfrom vlmchat.commands import main\n"
        "sys.argv = ['vlmchat', 'chat', '--image', 'missing.png', '-p', 'x', '--top-p', '0.9']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 66\n"
        "print([name for name in ('pydantic', 'httpx2', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n"
