"""`vlmchat config`: the settings in force and where each comes from.

Parses an empty `vlmchat chat` command line, so that it tells exactly what chat would use.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from vlmchat.commands.settings import Setting, read_aliases, settings


def config(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Show every setting of `vlmchat chat`, and where it comes from.

    The output is a settings file in TOML; what is commented out is not set.
    """
    root: Any = ctx.parent
    path, values = settings(root.command.commands["chat"], root)
    aliases = read_aliases(path) if path.exists() else {}
    if as_json:
        shown = {"schema": 1, "type": "config", "file": str(path), "exists": path.exists()}
        shown["settings"] = {
            s.key: {k: v for k, v in asdict(s).items() if k != "key"} for s in values
        }
        shown["models"] = aliases
        print(json.dumps(shown, ensure_ascii=False))
        return
    print(f"# settings file: {path}" + ("" if path.exists() else " (there is none)"))
    lines = [(_toml(setting), setting.place or setting.origin) for setting in values]
    width = max(len(line) for line, _ in lines)
    for line, origin in lines:
        print(f"{line:{width}}  # {origin}")
    if aliases:
        print("\n[models]")
    for name, model in aliases.items():
        print(f"{json.dumps(name)} = {json.dumps(model, ensure_ascii=False)}")


def _toml(setting: Setting) -> str:
    if setting.value is None:
        return f"# {setting.key} ="
    # A JSON text, number, boolean or list of texts is the same in TOML.
    return f"{setting.key} = {json.dumps(setting.value, ensure_ascii=False)}"
