"""The file of answers: torn lines, other files, locks, full disks, failed lines."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmchat.batch_answers import AnswersFile
from vlmchat.errors import DiskFull, InvalidRequest

TakeUp = Callable[..., AnswersFile]


def _answer(id: str, **more: Any) -> dict[str, Any]:
    return {"type": "answer", "id": id, "request": f"of {id}", "answer": "é", **more}


def _failure(id: str) -> dict[str, Any]:
    return {"type": "error", "id": id, "request": f"of {id}", "error": {"code": "x"}}


def _write(path: Path, *lines: dict[str, Any], end: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


@pytest.fixture
def take_up(path: Path) -> Iterator[TakeUp]:
    """Opens the file as a run does that comes after the last one."""
    files: list[AnswersFile] = []

    def run(**options: bool) -> AnswersFile:
        for file in files:
            file.close()
        files.append(AnswersFile(path, **options))
        return files[-1]

    yield run
    for file in files:
        file.close()


def test_answers_are_found_again_with_what_they_answer(path: Path, take_up: TakeUp) -> None:
    file = take_up()
    file.write(_answer("a"))
    file.write({"id": "r", "custom_id": "b", "response": {}, "error": {"code": "x"}})
    again = take_up()
    assert (again.done, again.failed) == ({"a": "of a", "b": "r"}, 1)


@pytest.mark.parametrize("size", [pytest.param(1, id="short"), pytest.param(200_000, id="long")])
def test_answers_lose_a_torn_last_line_only(path: Path, size: int, take_up: TakeUp) -> None:
    _write(path, _answer("a"), end='{"type": "answer", "id": "b", "answer": "' + "x" * size)
    file = take_up()
    file.write(_answer("c"))
    assert list(take_up().done) == ["a", "c"]


def test_answers_lose_a_torn_line_that_is_alone(path: Path, take_up: TakeUp) -> None:
    path.write_text('{"type"')
    assert take_up().done == {}
    assert path.read_bytes() == b""


def test_answers_keep_a_last_line_that_lacks_only_its_end(path: Path, take_up: TakeUp) -> None:
    _write(path, _answer("a"), end=json.dumps(_answer("b")))
    file = take_up()
    file.write(_answer("c"))
    assert list(take_up().done) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("name,colour\n", id="text"),
        pytest.param('{"custom_id": "a", "body": {}}\n', id="requests"),
        pytest.param('{"id": "a", "prompt": "x"}\n', id="simple requests"),
        pytest.param("[1]\n", id="list"),
    ],
)
def test_answers_leave_a_file_alone_that_is_something_else(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InvalidRequest, match="line 1 is not an answer"):
        AnswersFile(path, retry_failed=True)
    assert path.read_text() == text


def test_answers_belong_to_one_run_at_a_time(path: Path, take_up: TakeUp) -> None:
    take_up()
    with pytest.raises(InvalidRequest, match="another run"):
        AnswersFile(path)
    take_up()


def test_answers_are_not_written_to_a_device() -> None:
    with pytest.raises(InvalidRequest, match="not a file"):
        AnswersFile(Path("/dev/null"))


def test_answers_that_failed_are_taken_out_when_they_are_to_be_retried(
    path: Path, take_up: TakeUp
) -> None:
    _write(path, _answer("a"), _failure("b"), _answer("c"))
    file = take_up(retry_failed=True)
    assert (list(file.done), file.failed) == (["a", "c"], 0)
    with pytest.raises(InvalidRequest, match="another run"):  # the new file is locked too
        AnswersFile(path)
    file.write(_answer("b"))
    assert list(take_up().done) == ["a", "c", "b"]
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_answers_keep_names_that_are_not_utf8(path: Path, take_up: TakeUp) -> None:
    name = b"\xff.jpg".decode("utf-8", "surrogateescape")
    file = take_up()
    file.write(_answer(name))
    assert list(take_up().done) == [name]


def test_answers_leave_no_torn_line_when_the_disk_is_full(path: Path, take_up: TakeUp) -> None:
    file = take_up()
    file.write(_answer("a"))
    real = file._file

    class FullDisk:
        """Takes ten bytes, then no more."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def write(self, data: memoryview) -> int:
            if real.seek(0, 2) > whole:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(real.write(data[:10]))

    whole = path.stat().st_size
    file._file = FullDisk()
    with pytest.raises(DiskFull, match="no room left on the disk"):
        file.write(_answer("b"))
    assert path.stat().st_size == whole
