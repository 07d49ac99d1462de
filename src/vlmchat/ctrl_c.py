"""Ctrl-C while an answer is on its way: the first one stops it, the second one leaves it, no more.

Used by the REPL and the one-shot command around one answer. Knows only that answers can be
cancelled.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Protocol


class Cancellable(Protocol):
    """Something that ends early when told to."""

    @property
    def over(self) -> bool: ...

    def cancel(self) -> None: ...


class CtrlC:
    """Within `with`, SIGINT stops the answer given to `stops` instead of the program.

    The first stops the answer the orderly way, so that its counts still arrive. If that takes too
    long a second raises KeyboardInterrupt; any further one does nothing, nor does any once the
    answer is over and being saved. Outside of the main thread, where signals do not arrive,
    nothing changes.
    """

    def __init__(self) -> None:
        self._answer: Cancellable | None = None
        self._presses = 0
        self._before: Any = None

    def __enter__(self) -> CtrlC:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def stops(self, answer: Cancellable) -> None:
        """Stop this one, at once if Ctrl-C came before it had begun."""
        self._answer = answer
        if self._presses:
            answer.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        self._presses += 1
        if self._presses == 1 and self._answer is not None:
            # Not here: the interrupted code may hold the very lock that cancelling needs.
            threading.Thread(target=self._answer.cancel, daemon=True).start()
        elif self._presses == 2 and not (self._answer is not None and self._answer.over):
            raise KeyboardInterrupt
