"""`vlmchat models`: what is on this machine, what it takes, fetching, deleting, checking.

Reads configs and files' headers only; torch is never imported. Everything heavier than the
standard library is imported inside functions.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmchat.commands.exit import reporting
from vlmchat.commands.options import complete_model
from vlmchat.commands.settings import read_aliases, resolve_model, state_path
from vlmchat.config import DEMO_MODEL
from vlmchat.errors import CheckpointError, ConfigError, ModelNotFound, VlmchatError

if TYPE_CHECKING:
    from vlmchat.engine.checkpoint import Checkpoint

models = typer.Typer(
    help="List, inspect, download, delete and check models.",
    rich_markup_mode=None,
    no_args_is_help=False,
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="'demo', a directory, a model's name on the hub, or an alias.",
        autocompletion=complete_model,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit on the hub.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As one JSON object.")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", envvar="VLMCHAT_CONFIG", help="Settings file with the aliases."
    ),
]


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of the list. num_bytes: on disk; problem: why it cannot be run, None if it can."""

    model: str
    kind: str
    num_bytes: int
    aliases: tuple[str, ...]
    problem: str | None


@models.command("list")
def list_models(as_json: AsJson = False, config: Config = None) -> None:
    """List the models on this machine.

    These are the demo, those in the Hugging Face cache, directories that saved sessions used, and
    what aliases stand for. Of a model that cannot be run the reason is shown.
    """
    with _reporting(as_json):
        aliases = read_aliases(config)
        found = list(_everything(aliases))
        if as_json:
            rows = [
                {
                    "model": row.model,
                    "kind": row.kind,
                    "bytes": row.num_bytes,
                    "aliases": list(row.aliases),
                    "problem": row.problem,
                }
                for row in found
            ]
            _print_json("models", models=rows)
            return
        _print_list(found)


@models.command()
def show(model: Model, as_json: AsJson = False, config: Config = None) -> None:
    """Show what a model is and the memory it takes.

    In each precision, and whether this machine has as much free. Nothing is downloaded.
    """
    with _reporting(as_json):
        name = resolve_model(model, read_aliases(config))
        from vlmchat.engine.checkpoint import inspect

        found = inspect(_on_this_machine(name, None), name)
        devices = _free_memory()
        if as_json:
            _print_json("model", **_as_json(name, found, devices))
        else:
            _print_model(name, found, devices)


@models.command()
def pull(
    model: Model, revision: Revision = None, as_json: AsJson = False, config: Config = None
) -> None:
    """Download a model, or what is new of it.

    The vision tower that it names comes first. Ctrl-C stops; what has arrived is kept, and the
    next start goes on from there.
    """
    with _reporting(as_json):
        name = resolve_model(model, read_aliases(config))
        from vlmchat.engine import hub
        from vlmchat.engine.checkpoint import num_bytes

        if Path(name).is_dir() or not hub.is_hub_id(name):
            raise ConfigError(f"{name} is here, or is no hub id (owner/name); nothing to download")
        directory = hub.pull(name, revision, lambda stage: print(stage, file=sys.stderr))
        if as_json:
            size = num_bytes(directory)
            _print_json("pulled", model=name, directory=str(directory), bytes=size)
        else:
            print(directory)


@models.command()
def rm(
    model: Model,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Delete a model from the Hugging Face cache.

    All its revisions go. Nothing outside the cache is ever deleted, nor is the vision tower,
    which others may use.
    """
    with _reporting(as_json):
        name = resolve_model(model, read_aliases(config))
        from vlmchat.engine import hub
        from vlmchat.engine.download import size

        folder = hub.cached_folder(name)
        freed = hub.bytes_in(folder)
        if not yes:
            _ask(f"delete {name}, {size(freed)}, from {folder.parent}?")
        hub.remove(folder)
        if as_json:
            _print_json("removed", model=name, bytes=freed)
        else:
            print(f"deleted {name}, {size(freed)}")


@models.command()
def verify(
    model: Model, revision: Revision = None, as_json: AsJson = False, config: Config = None
) -> None:
    """Check that a model's files are whole.

    Every tensor that its index names is there, every file's table is sound and its size right;
    for files in the Hugging Face cache, whose names there are hashes, the hash is right.
    """
    with _reporting(as_json):
        name = resolve_model(model, read_aliases(config))
        from rich.console import Console

        from vlmchat.engine.checkpoint import verify as check

        with Console(stderr=True).status("checking") as status:  # hashing 10 GB takes its time
            counts, problems = check(_on_this_machine(name, revision), status.update)
        if as_json:
            _print_json("verified", model=name, ok=not problems, checked=counts, problems=problems)
        else:
            told = ", ".join(f"{count} {what}" for what, count in counts.items())
            print(*problems, f"checked {told}", sep="\n")
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckpointError(f"{name} is not whole: {problems[0]}{more}")


@contextmanager
def _reporting(as_json: bool) -> Iterator[None]:
    with reporting(as_json=as_json, debug=False):
        yield


def _on_this_machine(name: str, revision: str | None) -> Path:
    """The model's directory, whole or not. Raises ModelNotFound."""
    from vlmchat.engine import hub

    if hub.is_hub_id(name) and not Path(name).is_dir():
        found = hub.cached(name, revision)
        if found is None:
            raise ModelNotFound(
                f"{name} is not on this machine; 'vlmchat models pull {name}' downloads it"
            )
        return found
    directory = hub.find_checkpoint(name, None, lambda stage: None)
    if not directory.is_dir():
        raise ModelNotFound(f"this copy of vlmchat lacks its {name} model; install it again")
    return directory


def _everything(aliases: dict[str, str]) -> Iterator[Listed]:
    """The demo, the cache, sessions' directories, and aliases of what is not here."""
    from vlmchat.engine import hub

    meanings: dict[str, tuple[str, ...]] = {}
    for alias, model in aliases.items():
        meanings[model] = (*meanings.get(model, ()), alias)
    cached = {hub.repo_of(folder): folder for folder in hub.cached_folders()}
    names = dict.fromkeys([DEMO_MODEL, *cached, *_session_directories(), *meanings])
    for name in names:
        row = _listed(name, cached.get(name), meanings.get(name, ()))
        if row is not None:
            yield row


def _listed(name: str, folder: Path | None, aliases: tuple[str, ...]) -> Listed | None:
    """None for what is no checkpoint of ours at all: other models, vision towers."""
    from vlmchat.engine import hub
    from vlmchat.engine.checkpoint import Layout, describe_kind, layout_of, num_bytes, why_not

    try:
        directory = _on_this_machine(name, None)
    except VlmchatError:
        if folder is not None:  # a download that has only begun
            return Listed(name, "", hub.bytes_in(folder), aliases, "incomplete: lacks config.json")
        return Listed(name, "", 0, aliases, "not on this machine") if aliases else None
    config = hub.read_config(directory)
    if layout_of(directory, config) is Layout.UNKNOWN and not aliases:
        return None
    kind = describe_kind(directory, config)
    size = hub.bytes_in(folder) if folder else num_bytes(directory)
    return Listed(name, kind, size, aliases, why_not(directory, name))


def _session_directories() -> list[str]:
    """Directories that saved chats used as models and that are still there, the newest first."""
    from vlmchat.store import session_models

    return [name for name in session_models(state_path()) if Path(name).is_dir()]


def _free_memory() -> dict[str, int]:
    """Bytes free for a model: in main memory, and on each NVIDIA GPU, without torch."""
    import psutil

    devices = {"cpu": int(psutil.virtual_memory().available)}
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return devices
    query = [tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return devices
    free = [line.strip() for line in told.splitlines() if line.strip().isdigit()]
    return {f"cuda:{n}": int(mebibytes) * 2**20 for n, mebibytes in enumerate(free)} | devices


def _as_json(name: str, found: Checkpoint, devices: dict[str, int]) -> dict[str, Any]:
    return {
        "model": name,
        "directory": str(found.directory),
        "family": found.family,
        "layout": str(found.layout),
        "problem": found.problem,
        "bytes": found.num_bytes,
        "parameters": found.parameters,
        "context_length": found.context_length,
        "image_tokens": found.image_tokens
        and dict(zip(("min", "max"), found.image_tokens, strict=True)),
        "template": found.template,
        "vision_tower": found.tower,
        "base": found.base,
        "memory": {
            precision: {"bytes": need, "fits": {d: need <= free for d, free in devices.items()}}
            for precision, need in found.memory_bytes.items()
        },
        "free_memory": devices,
    }


def _print_model(name: str, found: Checkpoint, devices: dict[str, int]) -> None:
    from vlmchat.engine.download import size

    unknown = "not told by the files"
    away = " (not on this machine)" if found.tower and not found.tower_here else ""
    fewest, most = found.image_tokens or (0, 0)
    lines = {
        "model": name,
        "directory": str(found.directory),
        "family": found.family,
        "layout": str(found.layout),
        "problem": found.problem,
        "vision tower": found.tower and found.tower + away,
        "base": found.base,
        "on disk": size(found.num_bytes),
        "parameters": _count(found.parameters) if found.parameters else unknown,
        "context": f"{found.context_length} tokens" if found.context_length else unknown,
        "a picture": f"{fewest} to {most} tokens" if fewest < most else f"{most} tokens",
        "template": found.template,
    }
    if not most:
        lines["a picture"] = f"depends on {'its size' if not away else 'the vision tower'}"
    for title, value in lines.items():
        if value is not None:
            print(f"{title:13} {value}")
    for precision, need in found.memory_bytes.items():
        fits = [device for device, free in devices.items() if need <= free]
        verdict = f"fits on {', '.join(fits)}" if fits else "does not fit"
        print(f"{precision:13} {size(need)} of memory, {verdict}")
    if not found.memory_bytes:
        print(f"{'memory':13} depends on {found.base or 'a model'} that is not part of it")
    told = ", ".join(f"{device} {size(free)}" for device, free in devices.items())
    print(f"{'free memory':13} {told}")


def _count(number: int) -> str:
    """`7.06 billion`."""
    for word, unit in (("billion", 1e9), ("million", 1e6)):
        if number >= unit:
            return f"{number / unit:.3g} {word}"
    return f"{number:,}"


def _print_list(found: list[Listed]) -> None:
    from vlmchat.engine.download import size

    rows = [(row.model, row.kind, size(row.num_bytes) if row.num_bytes else "") for row in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for (model, kind, told), row in zip(rows, found, strict=True):
        notes = [f"alias {alias}" for alias in row.aliases]
        notes += [row.problem] if row.problem else []
        line = f"{model:{widths[0]}}  {kind:{widths[1]}}  {told:>{widths[2]}}  {'; '.join(notes)}"
        print(line.rstrip())


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("deleting asks first, and stdin is not a terminal; give --yes")
    print(question, "[y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was deleted")


def _print_json(kind: str, **values: Any) -> None:
    print(json.dumps({"schema": 1, "type": kind, **values}, ensure_ascii=False))
