"""The lines of vlmchat that docs/deploy.md and deploy/ hold, and the real parser to hold them to.

Nothing is run: Click makes each command's context, which reads its options and checks them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vlmchat.commands import command

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGE = ROOT / "docs" / "deploy.md"
DOCKERFILES = sorted(DEPLOY.glob("docker/Dockerfile.*"))
COMPOSE = sorted(DEPLOY.glob("compose*.yaml"))
UNITS = sorted(DEPLOY.glob("systemd/*.service"))
MANIFESTS = sorted(DEPLOY.glob("kubernetes/*/*.yaml"))
# What systemd puts in place of these.
_SPECIFIERS = {"%i": "21002", "%C": "/var/cache", "%L": "/var/log"}
_PROGRAM = re.compile(r"(?:\S*/)?vlmchat(?::\w+)?")  # a path to it, or an image whose entry it is


def parse(arguments: list[str]) -> None:
    """Let the program read these arguments. Raises Click's UsageError, or Exit after a help."""
    ctx: Any = None
    found: Any = command()
    name: str | None = "vlmchat"
    while True:
        ctx = found.make_context(name, arguments, parent=ctx)
        if not getattr(found, "commands", None):
            return
        name, found, arguments = found.resolve_command(ctx, [*ctx._protected_args, *ctx.args])


def variables() -> set[str]:
    """Every environment variable that an option can be set by."""
    return {
        name
        for below in _commands(command())
        for param in below.params
        for name in _listed(param.envvar)
    }


def _commands(root: Any) -> Iterator[Any]:
    yield root
    for below in getattr(root, "commands", {}).values():
        yield from _commands(below)


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def documents(path: Path) -> list[Any]:
    """What a file of YAML holds."""
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def lines() -> Iterator[tuple[str, list[str]]]:
    """(where, arguments) of every line."""
    for path in DOCKERFILES:
        yield path.name, json.loads(re.findall(r"^CMD (\[.+)$", path.read_text("utf-8"), re.M)[-1])
    for path in COMPOSE:
        for name, service in documents(path)[0]["services"].items():
            if "command" in service:
                yield f"{path.name} {name}", service["command"]
    for path in UNITS:
        for line in re.findall(r"^ExecStart=\S+/vlmchat (.+)$", path.read_text("utf-8"), re.M):
            yield path.name, shlex.split(_filled_in(line))
    for path in MANIFESTS:
        where, whole = f"{path.parent.name}/{path.name}", documents(path)
        yield from ((where, arguments) for arguments in _found("args", whole))
        yield from ((where, shlex.split(line)[1:]) for line in _found("entrypoint", whole))
    for line in of_page(PAGE.read_text("utf-8")):
        yield f"deploy.md: {' '.join(line)}", line


def _filled_in(line: str) -> str:
    for specifier, value in _SPECIFIERS.items():
        line = line.replace(specifier, value)
    return line


def _found(key: str, value: Any) -> Iterator[Any]:
    """Whatever stands under the key, at any depth."""
    if isinstance(value, dict):
        for name, below in value.items():
            if name == key:
                yield below
            yield from _found(key, below)
    elif isinstance(value, list):
        for below in value:
            yield from _found(key, below)


def of_page(text: str) -> Iterator[list[str]]:
    """The arguments of each `vlmchat …` in blocks of the shell, and in the text."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if kind in ("", "console", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                yield from _of_line(line)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for inline in re.findall(r"`(vlmchat [^`]+)`", prose):
        yield from _of_line(inline)


def _of_line(line: str) -> Iterator[list[str]]:
    """Of each part of a pipe or a list; what is no shell, such as output, has none."""
    try:
        reader = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        words = list(reader)
    except ValueError:
        return
    part: list[str] = []
    for word in [*words, ";"]:
        if re.fullmatch(r"[();<>|&]+", word):
            at = max((i for i, w in enumerate(part) if _PROGRAM.fullmatch(w)), default=len(part))
            if part[at + 1 :] and _is_command(part[:at]):
                yield part[at + 1 :]
            part = []
        else:
            part.append(word)


def _is_command(before: list[str]) -> bool:
    """Whether what stands before is what a command may stand behind."""
    plain = [word for word in before if not re.match(r"\w+=", word)]
    return not plain or plain[:2] == ["docker", "run"] or "exec" in plain
