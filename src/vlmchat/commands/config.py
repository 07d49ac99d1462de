"""`vlmchat config`: the settings in force and where each comes from.

Parses an empty `vlmchat chat` command line, so that it tells exactly what chat would use.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmchat.commands.exit import reporting
from vlmchat.commands.settings import Setting, read_aliases, settings
from vlmchat.json_line import json_line


def config(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Show every setting of `vlmchat chat`, and where it comes from.

    The output is a settings file in TOML; what is commented out is not set.
    """
    root: Any = ctx.parent
    with reporting(as_json=as_json, debug=False):
        path, values = settings(root.command.commands["chat"], root)
        aliases = read_aliases(path) if path.exists() else {}
        if as_json:
            print(json_line(_json(path, values, aliases), sys.stdout))
        else:
            print(_text(path, values, aliases))


def _json(path: Path, values: list[Setting], aliases: dict[str, str]) -> dict[str, Any]:
    shown = {s.key: {"value": s.value, "origin": s.origin, "place": s.place} for s in values}
    head = {"schema": 1, "type": "config", "file": str(path), "exists": path.exists()}
    return {**head, "settings": shown, "models": aliases}


def _text(path: Path, values: list[Setting], aliases: dict[str, str]) -> str:
    lines = [(_toml(setting), setting.place or setting.origin) for setting in values]
    width = max(len(line) for line, _ in lines)
    head = f"# settings file: {path}" + ("" if path.exists() else " (there is none)")
    named = [f"{json.dumps(a)} = {json.dumps(m, ensure_ascii=False)}" for a, m in aliases.items()]
    table = ["", "[models]", *named] if named else []
    return "\n".join([head, *(f"{line:{width}}  # {origin}" for line, origin in lines), *table])


def _toml(setting: Setting) -> str:
    if setting.value is None:
        return f"# {setting.key} ="
    # A JSON text, number, boolean or list of texts is the same in TOML.
    return f"{setting.key} = {json.dumps(setting.value, ensure_ascii=False)}"
