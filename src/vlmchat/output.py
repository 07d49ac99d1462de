"""Print an answer while it is made: as Markdown on a terminal, or as plain text.

Called by the REPL and the one-shot command. A printer runs a `Reply` to its end inside `with`,
so that whatever was said before Ctrl-C is both shown and kept. stdout gets the answer, stderr
everything about it. Knows nothing of sessions, prompts or models.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console
from rich.text import Text

from vlmchat.live_region import LiveRegion
from vlmchat.markdown_stream import MarkdownStream, Row, printable
from vlmchat.request import FinishReason, Status

if TYPE_CHECKING:
    from vlmchat.session import Reply, Trimmed

MIN_REDRAW_S = 1 / 15
# Drawing may take this share of the time; the rest belongs to the model.
MAX_DRAWING_SHARE = 0.15
_WAITING = Row("\x1b[2m…\x1b[0m", 1)


class Printer(Protocol):
    """Whatever can show an answer."""

    def answer(self, reply: Reply, status: Status) -> None:
        """Run `reply` to its end and show it. KeyboardInterrupt passes once all is shown."""


class _Screen(Protocol):
    """Where the text of one answer goes."""

    def add(self, text: str) -> None: ...

    def end(self) -> None: ...


class TextPrinter:
    """Answers for people: streamed Markdown on a terminal, otherwise the text as it comes.

    markdown: render it; only where `out` takes colours, and kept live only where it is a terminal.
    What was trimmed, and why an answer ended early, is said on `err`; with stats also what it took.
    """

    def __init__(
        self,
        out: Console,
        err: Console,
        *,
        markdown: bool = True,
        stats: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.out = out
        self.err = err
        self._markdown = markdown and out.is_terminal and not out.is_dumb_terminal
        self._stats = stats
        self._clock = clock

    def answer(self, reply: Reply, status: Status) -> None:
        """Run `reply` to its end and show it. KeyboardInterrupt passes once all is shown."""
        try:
            with reply:
                self._stream(reply)
        finally:
            if reply.finish_reason is not None:
                self._say_what_it_took(reply, status)

    def text(self, text: str) -> None:
        """Show an answer that is there already."""
        screen = self._screen()
        screen.add(text)
        screen.end()

    def _stream(self, reply: Reply) -> None:
        screen = self._screen()
        with _no_echo(self.out.file):
            try:
                for delta in reply:
                    if delta.text:
                        screen.add(delta.text)
            finally:
                screen.end()

    def _screen(self) -> _Screen:
        if self._markdown:
            return _MarkdownScreen(self.out, self._clock)
        return _PlainScreen(self.out.file)

    def _say_what_it_took(self, reply: Reply, status: Status) -> None:
        costs = _costs(reply, status) if self._stats else ()
        for line in [*_trimming(reply.trimmed), *_ending(reply), *costs]:
            self.err.print(Text(line, style="dim"), soft_wrap=True)


class _PlainScreen:
    """Text as it comes; ends with exactly one line break."""

    def __init__(self, file: TextIO | Any) -> None:
        self._file = file
        self._held = ""  # line breaks that nothing has followed yet

    def add(self, text: str) -> None:
        text = self._held + printable(text)
        body = text.rstrip("\n")
        self._held = text[len(body) :]
        self._file.write(body)
        self._file.flush()

    def end(self) -> None:
        self._file.write("\n")
        self._file.flush()


class _MarkdownScreen:
    """Markdown as it comes: settled rows once, the rest redrawn at a bounded rate."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._stream = MarkdownStream(console)
        self._console = console
        self._live = console.file.isatty()
        self._region = LiveRegion(console)
        self._clock = clock
        self._next_draw = clock()
        if self._live:
            self._region.draw([], [_WAITING])

    def add(self, text: str) -> None:
        self._stream.feed(text)
        start = self._clock()
        if start < self._next_draw:
            return
        self._draw(*self._stream.update())
        took = self._clock() - start
        self._next_draw = start + max(MIN_REDRAW_S, took / MAX_DRAWING_SHARE)

    def end(self) -> None:
        self._draw(*self._stream.update(final=True))

    def _draw(self, settled: list[Row], live: list[Row]) -> None:
        if self._live:
            self._region.draw(settled, live)
        else:
            self._console.file.write("".join(row.ansi + "\n" for row in settled))
            self._console.file.flush()


def _trimming(trimmed: Trimmed) -> Iterator[str]:
    if trimmed.turns:
        turns = "the oldest turn" if trimmed.turns == 1 else f"the {trimmed.turns} oldest turns"
        stay = "" if trimmed.images else "; the pictures stay"
        tokens = "" if trimmed.tokens is None else f" ({trimmed.tokens} tokens)"
        yield f"dropped {turns}{tokens} to stay inside the context{stay}"
    for image in trimmed.images:
        yield f"the picture {printable(image.source)} no longer fits and was dropped"


def _ending(reply: Reply) -> Iterator[str]:
    if reply.finish_reason is FinishReason.CANCELLED:
        yield "(stopped)"
    elif reply.finish_reason is FinishReason.LENGTH and reply.usage:
        yield f"(cut at --max-new-tokens {reply.usage.completion_tokens})"
    elif not reply.answer.strip():
        yield "(an empty answer)"


def _costs(reply: Reply, status: Status) -> Iterator[str]:
    usage, timings = reply.usage, reply.timings
    if usage is None or timings is None:
        return
    count = usage.completion_tokens
    parts = [f"{count} token" if count == 1 else f"{count} tokens"]
    if count:
        parts.append(f"first {timings.first_token_s:.2f} s")
    if timings.tokens_per_second:
        parts.append(f"{timings.tokens_per_second:.0f} tok/s")
    used = usage.prompt_tokens + count
    of = f"/{status.context_length}" if status.context_length else ""
    yield " · ".join([*parts, f"context {used}{of}"])


@contextlib.contextmanager
def _no_echo(file: Any) -> Iterator[None]:
    """Keys pressed while an answer is drawn must not be written into it; they are read later."""
    before = _terminal_modes(file)
    if before is None:
        yield
        return
    import termios

    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(file.fileno(), termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(file.fileno(), termios.TCSANOW, before)


def _terminal_modes(file: Any) -> list[Any] | None:
    """None where there is no terminal, or a system without such modes."""
    if not file.isatty():
        return None
    try:
        import termios
    except ImportError:
        return None
    try:
        return termios.tcgetattr(file.fileno())
    except (OSError, ValueError, termios.error):
        return None
