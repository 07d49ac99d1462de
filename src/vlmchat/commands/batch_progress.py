"""How a batch tells what it does: a bar on a terminal, a line now and then elsewhere, its end.

Called by `batch`. Everything goes to stderr but the summary in JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vlmchat.batch import Tally
from vlmchat.errors import SomeFailed
from vlmchat.json_line import json_line
from vlmchat.json_output import JSON_SCHEMA

if TYPE_CHECKING:
    from rich.progress import Progress

REPORT_EVERY_S = 30.0  # where there is no terminal to draw a bar on


class Run:
    """One run, as it is told.

    total: requests in the input, None where that shows only in passing.  done: those of them that
    earlier runs have answered.  failed: answers of earlier runs that are errors.
    """

    def __init__(
        self, err: Console, output: str, total: int | None, done: int, failed: int
    ) -> None:
        self.tally = Tally()
        self.model: str | None = None
        self._err, self._output = err, output
        self._total, self._done, self._failed = total, done, failed
        self._begun = self._reported = time.monotonic()
        self._bar: Progress | None = None

    @property
    def over(self) -> bool:
        """Nothing is left to ask."""
        return self._done == self._total

    @contextmanager
    def shown(self, model: str) -> Iterator[None]:
        """Within `with` the progress is shown; Ctrl-C is told how to go on."""
        self.model = model
        self._begun = self._reported = time.monotonic()
        try:
            if self._err.is_terminal and not self._err.is_dumb_terminal:
                with _bar(self._err) as self._bar:
                    self._bar.add_task("", total=self._total, completed=self._done, told="")
                    yield
            else:
                yield
        except KeyboardInterrupt:
            if self._output != "-":
                self._say(f"{self._progress()}; the same command goes on from here")
            raise

    def report(self, tally: Tally) -> None:
        """Called after every request; cheap."""
        self.tally = tally
        if self._bar is not None:
            told = f"{self._rate()}{self._failures()}"
            self._bar.update(self._bar.task_ids[0], completed=self._now(), told=told)
        elif time.monotonic() - self._reported >= REPORT_EVERY_S:
            self._reported = time.monotonic()
            self._say(self._progress() + self._left())

    def end(self, *, as_json: bool) -> None:
        """Tell what was done. Raises SomeFailed when a line in the output is an error."""
        if as_json:
            print(json_line(self._summary(), sys.stdout))
        self._say(self._progress())
        if failed := self._failed + self.tally.failed:
            of = "requests" if self._total is None else f"of {self._total} requests"
            again = "" if self._output == "-" else "; --retry-failed asks them again"
            raise SomeFailed(f"{failed} {of} failed, as the output tells{again}")

    def _say(self, line: str) -> None:
        self._err.print(line, markup=False, soft_wrap=True)

    def _now(self) -> int:
        return self._done + self.tally.answered + self.tally.failed

    def _seconds(self) -> float:
        return time.monotonic() - self._begun

    def _progress(self) -> str:
        of = "" if self._total is None else f" of {self._total}"
        before = f", {self._done} of them earlier" if self._done else ""
        return f"{self._now()}{of} done{before}{self._rate()}{self._failures()}"

    def _rate(self) -> str:
        count = self.tally.answered + self.tally.failed
        if not count:
            return ""
        seconds = self._seconds()
        each = f"{count / seconds:.1f}/s" if count > seconds else f"{seconds / count:.1f} s each"
        return f" · {each} · {self.tally.completion_tokens / seconds:.0f} tokens/s"

    def _failures(self) -> str:
        failed = self._failed + self.tally.failed
        return f" · {failed} failed" if failed else ""

    def _left(self) -> str:
        count = self.tally.answered + self.tally.failed
        if self._total is None or not count:
            return ""
        left_s = (self._total - self._now()) * self._seconds() / count
        return f" · {_duration(left_s)} left"

    def _summary(self) -> dict[str, Any]:
        seconds, counted = self._seconds(), asdict(self.tally)
        count = counted.pop("answered") + counted.pop("failed")
        return {
            "schema": JSON_SCHEMA,
            "type": "batch",
            "model": self.model,
            "output": self._output,
            "requests": self._total,
            "answered": self.tally.answered,
            "failed": self.tally.failed,
            "earlier": {"done": self._done, "failed": self._failed},
            "usage": counted,
            "seconds": round(seconds, 3),
            "requests_per_second": round(count / seconds, 3) if count else 0.0,
            "tokens_per_second": round(self.tally.completion_tokens / seconds, 2) if count else 0.0,
        }


def _bar(err: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
    return Progress(*columns, TimeRemainingColumn(), console=err)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
