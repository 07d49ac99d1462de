"""Runs the command line in this process or in one of its own, over a scripted model."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import ScriptedBackend, picture
from vlmchat.commands import main
from vlmchat.config import ModelConfig
from vlmchat.engine.engine import Engine

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    """A stdin that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass
class Run:
    """What a command did."""

    code: int
    out: str
    err: str


@dataclass
class Cli:
    """`vlmchat` in this process; `backend` answers, `loaded` are the models asked for."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    backend: ScriptedBackend = field(default_factory=lambda: ScriptedBackend(context_length=2048))
    loaded: list[ModelConfig] = field(default_factory=list)

    def __call__(self, *arguments: str, stdin: bytes | None = None) -> Run:
        """Run with these arguments; stdin None is a terminal."""
        file: Any = Terminal() if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))
        self.monkeypatch.setattr(sys, "stdin", file)
        self.monkeypatch.setattr(sys, "argv", ["vlmchat", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = self.capsys.readouterr()
        return Run(int(exit_info.value.code or 0), out, err)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """The command line with a scripted model in place of every other."""
    runner = Cli(monkeypatch, capsys)

    def load(config: ModelConfig, progress: object, *limits: object) -> ScriptedBackend:
        runner.loaded.append(config)
        return runner.backend

    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.setattr(runner.backend, "close", lambda: None)  # several runs share it
    monkeypatch.setattr("vlmchat.commands.end_on_signals", lambda: None)
    yield runner
    logging.disable(logging.NOTSET)


@pytest.fixture
def png(tmp_path: Path) -> str:
    """The path of a red picture, 8 by 6 pixels."""
    path = tmp_path / "red.png"
    path.write_bytes(picture().data)
    return str(path)


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the user's config file."""

    def write(text: str) -> Path:
        path = tmp_path / "config" / "vlmchat" / "config.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[bytes]]:
    """Starts `vlmchat` in a process of its own, over a slow scripted model."""

    def process(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.commands.scripted", *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), **{**pipes, **options})

    return process
