"""The command line: parse, build, run. The only place that reads the environment.

Nothing heavy is imported until a command's options have been read, so that help, the version and
usage errors are quick.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer

from vlmchat import __version__
from vlmchat.commands.batch import batch
from vlmchat.commands.bench import bench
from vlmchat.commands.chat import chat
from vlmchat.commands.cluster import cluster
from vlmchat.commands.config import config
from vlmchat.commands.controller import controller
from vlmchat.commands.exit import end_on_signals, leaving_at_once, reporting
from vlmchat.commands.models import models
from vlmchat.commands.options import GroupedCommand, grouped
from vlmchat.commands.status import status
from vlmchat.commands.threads import cpu_quota, settle
from vlmchat.commands.web import web
from vlmchat.commands.worker import worker

app = typer.Typer(
    name="vlmchat",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("chat", cls=GroupedCommand)(grouped(chat))
app.command("batch", cls=GroupedCommand)(grouped(batch))
app.command("bench", cls=GroupedCommand)(grouped(bench))
app.command("worker", cls=GroupedCommand)(grouped(worker))
app.command("controller", cls=GroupedCommand)(grouped(controller))
app.command("web", cls=GroupedCommand)(grouped(web))
app.command("status")(status)
app.command("config")(config)
app.add_typer(cluster, name="cluster")
app.add_typer(models, name="models")


def _version(value: bool) -> None:
    if value:
        print(f"vlmchat {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
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


def command() -> Any:
    """The whole command tree, as Click has it."""
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
        code = command().main(arguments, prog_name="vlmchat", standalone_mode=False)
        if code:
            raise SystemExit(code)
    sys.exit(code)


def _asked(arguments: list[str], flag: str) -> bool:
    """Whether errors in the options themselves, which nobody has read yet, are to be told so."""
    said = os.environ.get(f"VLMCHAT_{flag.upper()}", "").lower()
    by_variable = said in ("1", "true", "t", "yes", "y", "on") and f"--no-{flag}" not in arguments
    return by_variable or f"--{flag}" in arguments
