"""Where option values come from: flag > environment > config file > default.

Typer does the merging; this gives it the file's values before it reads the other options, and
tells afterwards which origin won. Called while the command line is parsed. Reads the environment.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

from vlmchat.config import DEMO_MODEL
from vlmchat.errors import ConfigError, ModelNotFound

UNSETTABLE = ("config", "help")  # parameters that a config file cannot hold
ALIASES = "models"  # the config file's table of names for models


def config_path() -> Path:
    """The config file's usual place, by the XDG rule."""
    return _xdg("XDG_CONFIG_HOME", ".config") / "config.toml"


def state_path() -> Path:
    """The directory of sessions and of the line history, by the XDG rule."""
    return _xdg("XDG_STATE_HOME", ".local/state")


def _xdg(variable: str, fallback: str) -> Path:
    folder = Path(os.environ.get(variable, ""))
    if not folder.is_absolute():
        try:
            folder = Path.home() / fallback
        except RuntimeError:
            raise ConfigError(f"you have no home directory; set HOME or {variable}") from None
    return folder / "vlmchat"


def read_config(ctx: typer.Context, value: Path | None) -> Path:
    """Callback of --config: the file's values become the defaults of this command's options.

    Its aliases for models are kept for `model_alias`. Raises ConfigError when the file cannot be
    read, holds a key that no option has, or a value of the wrong kind. A missing file is an error
    only when it was asked for.
    """
    path = value or config_path()
    if not ctx.resilient_parsing and (value is not None or path.exists()):
        document = _document(path)
        ctx.meta[ALIASES] = _aliases(path, document)
        ctx.default_map = _values(path, document, ctx)
    return path


def read_aliases(value: Path | None) -> dict[str, str]:
    """The names for models in the config file, `value` or the usual one. Raises ConfigError."""
    path = value or config_path()
    return _aliases(path, _document(path)) if value is not None or path.exists() else {}


def resolve_model(name: str, aliases: dict[str, str]) -> str:
    """What to load for a model's name: its alias's meaning, or the name itself.

    Raises ModelNotFound for a name that can only be a mistyped alias, with the nearest ones.
    """
    if name in aliases or "/" in name or os.path.exists(name):
        return aliases.get(name, name)
    known = [*aliases, DEMO_MODEL]
    close = get_close_matches(name, known, n=3)
    if close and name not in known:
        raise ModelNotFound(f"no model {name}; did you mean {' or '.join(close)}?")
    return name


def model_alias(ctx: typer.Context, value: str | None) -> str | None:
    """Callback of the options that name a model."""
    if value is None or ctx.resilient_parsing:
        return value
    return resolve_model(value, ctx.meta.get(ALIASES, {}))


def _document(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {path}: {reason}") from None


def _aliases(path: Path, document: dict[str, Any]) -> dict[str, str]:
    """Takes the table out of the document and checks it."""
    table = document.pop(ALIASES, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {ALIASES!r} must be a table: [{ALIASES}]")
    for name, model in table.items():
        if not isinstance(model, str):
            raise ConfigError(f"{path}: {ALIASES}.{name} is {model!r}; it must be a text")
        if "/" in name or name == DEMO_MODEL:
            raise ConfigError(f"{path}: {name!r} cannot stand for a model; choose another name")
    return table


def _values(path: Path, document: dict[str, Any], ctx: typer.Context) -> dict[str, Any]:
    """Option values by parameter name; the command's own table wins over the keys above it.

    Tables of other commands, and keys above them that only other commands have, are theirs.
    """
    own = _table_name(ctx)
    table = document.pop(own, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {own!r} must be a table: [{own}]")
    options, others = _options_by_key(ctx.command), _other_commands(ctx)
    theirs = {key for other in others.values() for key in _options_by_key(other)}
    merged = {}
    for key, value in [*document.items(), *table.items()]:
        name = key.replace("_", "-")
        if name not in options and key not in table and (name in others or name in theirs):
            continue
        if name not in options:
            close = get_close_matches(name, options, n=1)
            raise ConfigError(
                f"{path}: unknown setting {key!r}" + (f"; is it {close[0]!r}?" if close else "")
            )
        param, negated = options[name]
        fit = checked(f"{path}: {key}", value, param.type_descriptor.annotation)
        merged[param.name] = not fit if negated else fit
    return merged


def _table_name(ctx: typer.Context) -> str:
    """The command's name; that of its group, where it is in one."""
    level: Any = ctx
    while level.parent is not None and level.parent.parent is not None:
        level = level.parent
    return str(level.info_name)


def _other_commands(ctx: typer.Context) -> dict[str, Any]:
    """Table -> command, for those beside this one that a settings file is for too."""
    from vlmchat.commands import command as whole  # which may have made less

    commands = whole().commands if ctx.parent else {}
    single = {
        name: one
        for name, command in commands.items()
        for one in (command, *getattr(command, "commands", {}).values())
        if any(p.name == "config" for p in one.params)
    }
    return {name: other for name, other in single.items() if name != _table_name(ctx)}


def _options_by_key(command: Any) -> dict[str, tuple[Any, bool]]:
    """Key -> (option, whether the key is its negative form), for all but --config and --help."""
    options: dict[str, tuple[Any, bool]] = {}
    for param in command.params:
        if param.name not in UNSETTABLE:
            options |= {flag[2:]: (param, False) for flag in param.opts if flag[:2] == "--"}
            options |= {flag[2:]: (param, True) for flag in param.secondary_opts}
    return options


def checked(where: str, value: Any, kind: Any) -> Any:
    """`value` if its type fits the option's, one item for a list included. Raises ConfigError."""
    if get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return [checked(where, item, get_args(kind)[0]) for item in items]
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    wanted = next((k for k in names if kind is k or k in get_args(kind)), str)
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if not fits:
        raise ConfigError(f"{where} is {value!r}; it must be {names.get(wanted, 'a text')}")
    return value


def given(ctx: typer.Context) -> frozenset[str]:
    """The parameters set by a flag or a variable: they win over what a saved session holds."""
    names = (param.name for param in ctx.command.params)
    sources = {name: ctx.get_parameter_source(name) for name in names if name}
    return frozenset(
        n for n, s in sources.items() if s and s.name in ("COMMANDLINE", "ENVIRONMENT")
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """One option's value in force, and where it comes from."""

    key: str
    value: Any
    origin: str  # environment | file | default
    place: str | None  # the variable's name, the file's path


def settings(command: Any, parent: typer.Context | None) -> tuple[Path, list[Setting]]:
    """The config file, and what every option of `command` would be if no flag were given."""
    ctx = command.make_context(command.name, [], parent=parent)
    shown = [param for param in command.params if param.name not in UNSETTABLE]
    return ctx.params["config"], [_setting(ctx, param) for param in shown]


def _setting(ctx: typer.Context, param: Any) -> Setting:
    origins = {
        "ENVIRONMENT": ("environment", param.envvar),
        "DEFAULT_MAP": ("file", str(ctx.params["config"])),
    }
    source = ctx.get_parameter_source(param.name)
    origin, place = origins.get(source.name if source else "", ("default", None))
    return Setting(param.opts[0].lstrip("-"), ctx.params[param.name], origin, place)
