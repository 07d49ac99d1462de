"""How a command ends: one line on stderr (or one JSON object) and an exit code.

`commands.main` and each command wrap what they do in `reporting`: above it there is no exception
but SystemExit, which nothing below it raises but a signal.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

import typer

from vlmchat.errors import OutOfMemory, VlmchatError
from vlmchat.json_line import json_line
from vlmchat.loading import still_loading

# What has no class in the error tree: code -> (exit code, when).
OTHER_EXITS = {
    "usage": (2, "a flag that does not exist, or a value that it does not take"),
    "internal": (70, "a bug in vlmchat; `--debug` shows where"),
    "io": (74, "a file, or standard output, cannot be written"),
    "interrupted": (130, "Ctrl-C; what had been said is printed and kept"),
    "broken_pipe": (141, "whoever read the output has gone; nothing is reported"),
    "terminated": (143, "SIGTERM; nothing is reported, as for SIGHUP, which gives 129"),
}


@contextmanager
def reporting(*, as_json: bool, debug: bool) -> Iterator[None]:
    """Turn whatever is raised inside into a report on stderr and SystemExit."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "standard output is closed")
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _drop(sys.stdout)
        raise SystemExit(OTHER_EXITS["broken_pipe"][0]) from None
    except (Exception, KeyboardInterrupt) as error:  # a bug is told in one line, as all else is
        if debug and not isinstance(error, KeyboardInterrupt | typer.TyperException):
            traceback.print_exc()
        code, message, exit_code = describe(error)
        message = " ".join(message.split())
        if isinstance(error, OSError):
            _drop(sys.stdout)  # or the interpreter fails to flush it once more, aloud
        report = {"error": {"code": code, "message": message, "exit_code": exit_code}}
        if sys.stderr is not None:
            line = json_line(report, sys.stderr) if as_json else f"vlmchat: {message}"
            try:
                print(line, file=sys.stderr, flush=True)
            except OSError:  # the exit code is all that is left to tell
                _drop(sys.stderr)
        raise SystemExit(exit_code) from None


def describe(error: BaseException) -> tuple[str, str, int]:
    """Code, one line for people, and exit code of any exception."""
    if isinstance(error, VlmchatError):
        return error.code, error.message, error.exit_code
    if isinstance(error, MemoryError):
        return OutOfMemory.code, "out of memory", OutOfMemory.exit_code
    if isinstance(error, typer.TyperException):
        code, message = "usage", _usage_message(error)
    elif isinstance(error, KeyboardInterrupt):
        code, message = "interrupted", "interrupted"
    elif isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        code, message = "io", f"{(error.strerror or str(error)).lower()}{place}"
    else:
        kind = type(error).__name__
        code, message = "internal", f"internal error: {kind}: {error}; --debug shows where"
    return code, message, OTHER_EXITS[code][0]


def _usage_message(error: Any) -> str:
    """Typer's words on one line, with the option, where its value came from, and where help is."""
    ctx, param = getattr(error, "ctx", None), getattr(error, "param", None)
    if ctx is None or param is None:
        message = error.format_message()
    else:
        source = ctx.get_parameter_source(param.name)
        places = {"ENVIRONMENT": param.envvar, "DEFAULT_MAP": ctx.params.get("config")}
        place = places.get(source.name) if source else None
        origin = f" (set in {place})" if place else ""
        message = f"{param.opts[0]}{origin}: {error.message.removeprefix('Value error, ')}"
    message = message[:1].lower() + message[1:].rstrip(".")
    return f"{message}; see '{ctx.command_path if ctx else 'vlmchat'} --help'"


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """The end of a process whose model still loads: that thread is in no state to be unwound."""
    code: Any = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
        raise
    finally:
        if still_loading():
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, AttributeError):
                    stream.flush()
            os._exit(code or 0)


def _drop(stream: TextIO | None) -> None:
    """Point a stream at nothing, so that flushing it at exit cannot fail again."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind: sessions are saved, the terminal is put back."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), end)
