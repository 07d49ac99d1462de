"""What the chat's commands act on: the session and the terminal around it.

Used by `slash` and `repl`. Knows how to say things at the terminal, nothing of commands and keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmchat.conversation import Image
from vlmchat.images import ImageLoader
from vlmchat.markdown_stream import printable
from vlmchat.output import TextPrinter
from vlmchat.session import ChatSession, Reply
from vlmchat.session_file import SavedSession
from vlmchat.store import Autosave
from vlmchat.terminal_image import show

_TURNS_SHOWN_ON_RESUME = 2


@dataclass(slots=True)
class Totals:
    """What this run has cost so far."""

    turns: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def add(self, reply: Reply) -> None:
        """Count an answer that has ended."""
        self.turns += 1
        if reply.usage is not None:
            self.prompt_tokens += reply.usage.prompt_tokens
            self.image_tokens += reply.usage.image_tokens
            self.cached_tokens += reply.usage.cached_tokens
            self.completion_tokens += reply.usage.completion_tokens
        if reply.timings is not None:
            self.seconds += reply.timings.total_s


@dataclass(slots=True)
class Chat:
    """What commands act on: the one conversation of the REPL and what surrounds it.

    console: where everything but the answers is said.  env: the terminal's variables.
    """

    session: ChatSession
    loader: ImageLoader
    printer: TextPrinter
    console: Console
    env: Mapping[str, str]
    autosave: Autosave | None = None
    totals: Totals = field(default_factory=Totals)

    def say(self, text: str, style: str = "dim") -> None:
        """One remark, never read as markup."""
        self.console.print(Text(printable(text), style))

    def attach(self, image: Image) -> None:
        """Show the picture and let it go with the next question."""
        self.session.attach(image)
        show(image, self.console, self.env)
        self.say(f"picture {len(self.images)}: {described(image)}")

    @property
    def images(self) -> tuple[Image, ...]:
        """All pictures: those sent, then those that wait."""
        return self.session.conversation.images + self.session.queued

    def print_rows(self, rows: Iterable[tuple[str | Text, ...]]) -> None:
        """A table without lines; texts are never read as markup."""
        table = Table.grid(padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(
                *(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row)
            )
        if table.rows:
            self.console.print(table)

    def say_lost(self, saved: SavedSession) -> None:
        """Name the pictures that a saved session no longer has."""
        for source in saved.lost:
            self.say(f"the picture {source} is lost: its saved file is gone or damaged", "yellow")

    def show_tail(self) -> None:
        """The last turns and what waits, for somebody who comes back."""
        turns = self.session.conversation.turns
        earlier = len(self.session.forgotten) + len(turns) - _TURNS_SHOWN_ON_RESUME
        if earlier > 0:
            self.say(f"… {count(earlier, 'earlier turn')}; /history lists them")
        for image in self.session.conversation.images[-1:]:
            show(image, self.console, self.env)
        for turn in turns[-_TURNS_SHOWN_ON_RESUME:]:
            self.say(f"> {turn.user.text}", "bold")
            self.printer.text(turn.answer)
        for image in self.session.queued:
            show(image, self.console, self.env)
            self.say(f"{described(image)} waits for the next question")


def described(picture: Image) -> str:
    """What a picture is called, and its size."""
    return f"{picture.source} ({picture.width}×{picture.height})"


def first_words(text: str, length: int = 48) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def count(number: int, noun: str) -> str:
    """'1 turn', '2 turns'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
