"""The command line: parse, build, run. The only place that reads the environment.

Nothing heavy is imported until a command's options have been read, so that help, the version and
usage errors are quick.
"""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer

from vlmchat import __version__
from vlmchat.commands.exit import end_on_signals, leaving_at_once, reporting
from vlmchat.commands.options import GroupedCommand, grouped
from vlmchat.commands.plain_values import PlainGroup
from vlmchat.commands.threads import cpu_quota, settle

# In the order of the help; each is in the module of its name, and so is its function.
_WITH_MANY_OPTIONS = ("chat", "batch", "bench", "worker", "controller", "web")
_COMMANDS = (*_WITH_MANY_OPTIONS, "status", "config", "cluster", "models")
_ALONE = set(_COMMANDS) - {"config"}  # which asks for the options of others
_NAMES_ONLY = ("--help", "-h", "--version")


def _version(value: bool) -> None:
    if value:
        print(f"vlmchat {__version__}")
        raise typer.Exit


def vlmchat(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")
    ] = False,
) -> None:
    """Chat with vision-language models."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def command(first: str = "") -> Any:
    """The command tree, as Click has it: whole, or what of it a command line needs.

    first: its first word; it names the one command that is needed, or asks for their names.
    """
    app = typer.Typer(
        name="vlmchat",
        cls=PlainGroup,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback(invoke_without_command=True)(vlmchat)
    for name in (first,) if first in _ALONE else _COMMANDS:
        what = getattr(import_module(f"vlmchat.commands.{name}"), name)
        if isinstance(what, typer.Typer):
            app.add_typer(what, name=name)
        elif first in _NAMES_ONLY:
            app.command(name, help=what.__doc__)(lambda: None)
        elif name in _WITH_MANY_OPTIONS:
            app.command(name, cls=GroupedCommand)(grouped(what))
        else:
            app.command(name)(what)
    root: Any = typer.main.get_command(app)
    for param in (p for name in root.commands for p in root.commands[name].params):
        param.envvar_list_splitter = "\n"  # a question has spaces: one value per line
    return root


def main() -> None:
    """Run the command line and exit."""
    settle(os.environ, cpu_quota())
    arguments = sys.argv[1:]
    end_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what its encoding has not
    as_json, debug = _asked(arguments, "json"), _asked(arguments, "debug")
    with leaving_at_once(), reporting(as_json=as_json, debug=debug):
        code = command(*arguments[:1]).main(arguments, prog_name="vlmchat", standalone_mode=False)
        if code:
            raise SystemExit(code)
    sys.exit(code)


def _asked(arguments: list[str], flag: str) -> bool:
    """Whether errors in the options themselves, which nobody has read yet, are to be told so."""
    said = os.environ.get(f"VLMCHAT_{flag.upper()}", "").lower()
    by_variable = said in ("1", "true", "t", "yes", "y", "on") and f"--no-{flag}" not in arguments
    return by_variable or f"--{flag}" in arguments
