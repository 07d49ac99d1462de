"""Write the reference pages that are made from the code: `make docs`.

docs/cli.md is the help of every command, docs/errors.md the error tree with its codes. A test
compares them with what this would write.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from vlmchat.commands import command
from vlmchat.commands.exit import OTHER_EXITS
from vlmchat.errors import VlmchatError

DOCS = Path(__file__).parents[1] / "docs"
MADE = "<!-- Made by `make docs`; do not edit. -->"
WIDTH = 100

CLI = f"""{MADE}
# Command line

Every option can be set in four places. The first that is set wins:

1. the flag;
2. its environment variable, shown as `env var` below (several values: one per line);
3. the settings file, `vlmchat/config.toml` under `$XDG_CONFIG_HOME` (by default `~/.config`);
4. the default.

In the settings file a key is an option's name without the dashes before it: `temperature = 0`,
`model-path = "demo"`. Keys may stand under the name of a command, such as `[chat]` or `[batch]`,
and win there; elsewhere each command takes those that it has. `vlmchat config` shows what is in
force for `vlmchat chat` and where it comes from, as a settings file. The table `[models]` holds
aliases: `llava = "liuhaotian/llava-v1.5-7b"` lets `--model-path llava` and
`vlmchat models show llava` mean that model; an alias wins over a directory of the same name in the
working directory, which is `./llava`. A resumed session keeps its own model, system prompt and
sampling options, unless a flag or a variable says otherwise.

Shell completion: `vlmchat --install-completion`.
"""

ERRORS = f"""{MADE}
# Errors and exit codes

An error is one line on stderr, `vlmchat: …`; with `--json` it is one object:
`{{"error": {{"code": …, "message": …, "exit_code": …}}}}`. Codes and exit codes are stable,
messages are not. `--debug` adds where it arose.

## Exit codes

| exit | when |
|---|---|
| 0 | all was answered |
"""


def cli_page() -> str:
    """docs/cli.md."""
    root = command()
    ctx = typer.Context(root, info_name="vlmchat", terminal_width=WIDTH, **root.context_settings)
    sections = (f"\n## {c.command_path}\n\n```\n{_help(c)}\n```\n" for c in _contexts(ctx))
    return CLI + "".join(sections)


def _contexts(ctx: Any) -> Iterator[Any]:
    """A command's context, then those of the commands below it."""
    yield ctx
    for name, below in getattr(ctx.command, "commands", {}).items():
        yield from _contexts(typer.Context(below, ctx, name))


def _help(ctx: typer.Context) -> str:
    return "\n".join(line.rstrip() for line in ctx.get_help().splitlines())


def errors_page() -> str:
    """docs/errors.md."""
    classes = list(error_classes())
    exits: dict[int, list[str]] = {}
    for kind in classes:
        exits.setdefault(kind.exit_code, []).append(f"`{kind.code}`: {_meaning(kind)}")
    for code, (number, meaning) in OTHER_EXITS.items():
        exits.setdefault(number, []).append(f"`{code}`: {meaning}")
    rows = [f"| {number} | {'<br>'.join(exits[number])} |" for number in sorted(exits)]
    tree = [f"| `{k.code}` | {k.__name__} | {k.exit_code} | {k.http_status} |" for k in classes]
    head = "\n## Error classes\n\n| code | class | exit | HTTP |\n|---|---|---|---|\n"
    return ERRORS + "\n".join(rows) + "\n" + head + "\n".join(tree) + "\n"


def error_classes(root: type[VlmchatError] = VlmchatError) -> Iterator[type[VlmchatError]]:
    """The error tree below `root`, each class before those below it."""
    for child in root.__subclasses__():
        if child.__module__ == "vlmchat.errors":
            yield child
            yield from error_classes(child)


def _meaning(kind: type[VlmchatError]) -> str:
    text = " ".join((kind.__doc__ or "").split()).rstrip(".")
    return text[:1].lower() + text[1:]


def pages() -> dict[Path, str]:
    """Each page made from the code, and its text."""
    return {DOCS / "cli.md": cli_page(), DOCS / "errors.md": errors_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
