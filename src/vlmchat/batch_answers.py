"""The file that a batch's answers go to: one line each, never lost, never written twice.

Used by the batch command; `batch` writes to it through `Answers.write` alone. A run that was
killed leaves a file that `open_answers` takes up again: a torn last line is cut off, and whose
answers are there is known from the lines themselves. Knows nothing of models or pictures.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from vlmchat.errors import DiskFull, InvalidRequest

Line = dict[str, Any]


class Answers(Protocol):
    """Where finished lines go. Called from many threads, one at a time."""

    def write(self, line: Line) -> None:
        """The line, whole. Raises OSError, DiskFull."""


class AnswersStream:
    """Lines to standard output: nothing to resume."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, line: Line) -> None:
        """See `Answers.write`."""
        self._stream.write(_encoded(line))
        self._stream.flush()


class AnswersFile:
    """A file of answers, locked against other runs until `close`.

    done: id -> the fingerprint of the request that the line answers.  failed: how many of these
    lines are errors.
    """

    def __init__(self, path: Path, *, retry_failed: bool = False) -> None:
        """Take up the file, or begin it.

        retry_failed: lines that are errors are taken out, so that their requests are asked again.
        Raises InvalidRequest when it is not a file of answers or another run writes to it.
        """
        if path.exists() and not path.is_file():
            raise InvalidRequest(f"{path} is not a file; '-' is standard output")
        self.path = path
        self._file = _open_locked(path)
        try:
            self._cut_torn_line()
            self.done, self.failed = self._read_done()
            if retry_failed and self.failed:
                self._file = self._without_failed()
                self.done, self.failed = self._read_done()
        except BaseException:
            self._file.close()
            raise

    def write(self, line: Line) -> None:
        """See `Answers.write`. What does not fit on the disk leaves no trace in the file."""
        end = self._file.seek(0, os.SEEK_END)
        rest = memoryview(_encoded(line))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(self.path) from None
            raise

    def close(self) -> None:
        """Make sure that it is on the disk, and let others have it."""
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def _cut_torn_line(self) -> None:
        """A last line without its end: completed if only that is missing, else cut off."""
        start = end = self._file.seek(0, os.SEEK_END)
        last, length = b"", 2**16
        while start and b"\n" not in last:
            start, length = max(0, end - length), 2 * length
            last = self._from(start, end)
        last = last[last.rfind(b"\n") + 1 :]
        if _parsed(last) is not None:
            self._file.seek(0, os.SEEK_END)
            self._file.write(b"\n")
        elif last:
            self._file.truncate(end - len(last))

    def _from(self, start: int, end: int) -> bytes:
        self._file.seek(start)
        return b"".join(iter(lambda: self._file.read(end - self._file.tell()), b""))

    def _lines(self) -> Iterator[tuple[bytes, Line]]:
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                line = _parsed(raw)
                if line is None or answered_id(line) is None:
                    raise InvalidRequest(
                        f"{self.path}: line {number} is not an answer of vlmchat batch; "
                        "choose another output file"
                    )
                yield raw, line

    def _read_done(self) -> tuple[dict[str, str], int]:
        done, failed = {}, 0
        for _, line in self._lines():
            done[str(answered_id(line))] = fingerprint_of(line)
            failed += is_failure(line)
        return done, failed

    def _without_failed(self) -> Any:
        """The file again without errors: written beside it and put in its place in one step."""
        beside = self.path.with_name(f".{self.path.name}.retry")
        beside.unlink(missing_ok=True)
        file = _open_locked(beside)
        try:
            with os.fdopen(os.dup(file.fileno()), "wb") as out:
                out.writelines(raw for raw, line in self._lines() if not is_failure(line))
                out.flush()
                os.fsync(out.fileno())
            os.replace(beside, self.path)
        except BaseException as error:
            file.close()
            beside.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(self.path) from None
            raise
        self._file.close()
        return file


def answered_id(line: Line) -> str | None:
    """The id of the request that a line of either form answers."""
    if "response" in line:
        id = line.get("custom_id")
    else:
        id = line.get("id") if line.get("type") in ("answer", "error") else None
    return id if isinstance(id, str) else None


def is_failure(line: Line) -> bool:
    """Whether the line tells an error."""
    return line.get("error") is not None


def fingerprint_of(line: Line) -> str:
    """What the request looked like: see `batch.Request.fingerprint`."""
    return str(line.get("id" if "response" in line else "request", ""))


def _encoded(line: Line) -> bytes:
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # the name of a file that is not UTF-8
        return (json.dumps(line) + "\n").encode()


def _parsed(raw: bytes) -> Line | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _disk_full(path: Path) -> DiskFull:
    return DiskFull(
        f"{path}: no room left on the disk; every finished answer is kept, free some room and "
        "run this again to go on"
    )


def _open_locked(path: Path) -> Any:
    """The file, unbuffered, for this process alone."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
        try:
            if not _lock(file):
                raise InvalidRequest(f"{path}: another run of vlmchat batch is writing to it")
            if _is_at(descriptor, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the other run put another file in its place, and ended


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _lock(file: Any) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks here
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # nor on this file system
        return True
    return True
