"""Markdown that arrives in pieces, as rows for a terminal: those that are settled, and the rest.

Called by `output` for each redraw. markdown-it-py, rich's own parser, finds the blocks; a block
that another one follows can never change again, so its rows are handed out once and its source
is forgotten. Lists settle item by item and code line by line. Knows nothing of cursors, screens
or time.

Nothing a model writes is lost or obeyed: HTML, images and reference definitions are shown as
they are typed, links show their address, and control characters become visible signs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, ListElement, Markdown, MarkdownElement
from rich.padding import Padding
from rich.segment import Segment, Segments
from rich.syntax import Syntax

CODE_THEME = "monokai"
# Ordered lists keep room for two digits, so that item 10 does not move items 1 to 9.
LIST_NUMBERS_UP_TO = 98

_CONTROL = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE: dict[int, int | str | None] = {
    **_CONTROL,
    0x0D: None,
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
    **dict.fromkeys((0x2028, 0x2029), "\n"),
}


def printable(text: str) -> str:
    """The text with every character that could drive a terminal replaced by a visible sign."""
    return text.translate(_VISIBLE)


@dataclass(frozen=True, slots=True)
class Row:
    """One line on the screen: text with its colour codes, and the cells that it takes."""

    ansi: str
    cells: int


@dataclass(frozen=True, slots=True)
class _Block:
    """A top-level block of the source, or one item of a top-level list."""

    tokens: tuple[Token, ...]
    start: int  # its first line in the source
    number: int | None = None  # of a list item
    follows_on: bool = False  # an item after another one of the same list

    @property
    def code(self) -> Token | None:
        """The one token of a code block."""
        token = self.tokens[0]
        return token if token.type in {"fence", "code_block"} else None


class MarkdownStream:
    """`feed` text as it comes; `update` returns the rows settled since, and those still open."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # HTML, images and definitions that change earlier text would hide what was written.
        self._parser = MarkdownIt("commonmark", {"html": False})
        self._parser.enable(["table", "strikethrough"]).disable(["reference", "image"])
        self._source = ""  # from the first block that is still open
        self._number: int | None = None  # of the first open block, if it goes on with a list
        self._code_lines = 0  # of the first open block, already handed out
        self._began = False  # something was handed out

    def feed(self, text: str) -> None:
        """Add text, at any boundary."""
        self._source += printable(text)

    def update(self, *, final: bool = False) -> tuple[list[Row], list[Row]]:
        """(rows settled since the last call, rows of what is still open).

        The first never change and are returned once; `final` settles everything.
        """
        settled = self._settle_all() if final else self._settle_complete_lines()
        return settled, [] if final else self._rows(self._blocks(self._source))

    def _settle_all(self) -> list[Row]:
        rows = self._rows(self._blocks(self._source))
        self._source, self._number, self._code_lines = "", None, 0
        self._began = self._began or bool(rows)
        return rows

    def _settle_complete_lines(self) -> list[Row]:
        """Only whole lines count: half a line may turn out to be something else."""
        complete = self._source[: self._source.rfind("\n") + 1]
        blocks = self._blocks(complete)
        if not blocks:
            return []
        *done, last = blocks
        rows = self._rows(done)
        self._began = self._began or bool(rows)
        if done:
            self._source = _from_line(self._source, last.start)
            self._number = last.number if last.follows_on else None
            self._code_lines = 0
        if last.code is not None:
            rows += self._rows([last])
            self._began = self._began or bool(rows)
            self._code_lines = len(_code_lines(last.code.content))
        return rows

    def _blocks(self, source: str) -> list[_Block]:
        return list(_split(self._parser.parse(source), self._number))

    def _rows(self, blocks: Sequence[_Block]) -> list[Row]:
        """The rows of open blocks, less those that were handed out, one empty row between."""
        rows: list[Row] = []
        for index, block in enumerate(blocks):
            skip = self._code_lines if index == 0 else 0
            body = self._render(block, skip)
            began = self._began or bool(rows)
            if body and began and not block.follows_on and not skip:
                rows.append(Row("", 0))
            rows += body
        return rows

    def _render(self, block: _Block, skip: int) -> list[Row]:
        content: RenderableType = _Tokens(block.tokens)
        if block.code is not None:
            content = _Code(block.code, skip)
        lines = self._console.render_lines(content, pad=False)
        while lines and not _without_padding(lines[0]):
            lines.pop(0)
        while lines and not _without_padding(lines[-1]):
            lines.pop()
        return self._to_rows(lines)

    def _to_rows(self, lines: list[list[Segment]]) -> list[Row]:
        """One string a line, each with its own colours, so that any line can be drawn alone."""
        lines = [_without_padding(line) for line in lines]
        segments = [part for line in lines for part in (*line, Segment.line())]
        with self._console.capture() as capture:
            self._console.print(Segments(segments), end="", soft_wrap=True)
        drawn = capture.get().split("\n")
        return [
            Row(ansi, Segment.get_line_length(line))
            for ansi, line in zip(drawn, lines, strict=False)
        ]


def _split(tokens: Sequence[Token], number: int | None) -> Iterator[_Block]:
    """The top-level blocks; a list as its items. `number`: the first block goes on with a list."""
    position = 0
    while position < len(tokens):
        end = _end_of(tokens, position)
        block = tuple(tokens[position:end])
        if block[0].type in {"bullet_list_open", "ordered_list_open"}:
            yield from _items(block, number)
        else:
            yield _Block(block, _first_line(block[0]))
        position, number = end, None


def _items(tokens: tuple[Token, ...], number: int | None) -> Iterator[_Block]:
    opening, closing = tokens[0], tokens[-1]
    follows_on = number is not None
    number = int(opening.attrs.get("start", 1)) if number is None else number
    position = 1
    while position < len(tokens) - 1:
        end = _end_of(tokens, position)
        head = opening.copy(attrs={"start": number})
        item = (head, *tokens[position:end], closing)
        yield _Block(item, _first_line(tokens[position]), number, follows_on)
        position, number, follows_on = end, number + 1, True


def _end_of(tokens: Sequence[Token], start: int) -> int:
    """The index after the token that closes the one at `start`."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += tokens[index].nesting
        if depth == 0:
            return index + 1
    return len(tokens)


def _first_line(token: Token) -> int:
    return token.map[0] if token.map else 0


def _from_line(source: str, line: int) -> str:
    position = 0
    for _ in range(line):
        position = source.index("\n", position) + 1
    return source[position:]


def _without_padding(line: list[Segment]) -> list[Segment]:
    """Without the spaces at the end that nobody can see."""
    kept = list(line)
    while kept and (kept[-1].style is None or kept[-1].style.bgcolor is None):
        last = kept.pop()
        if text := last.text.rstrip():
            return [*kept, Segment(text, last.style)]
    return kept


def _code_lines(code: str) -> list[str]:
    """The lines, without spaces at their ends and without empty ones at the end."""
    lines = [line.rstrip() for line in code.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


class _Code:
    """Highlighted code from line `skip` on; lines before it set the highlighter's state only."""

    def __init__(self, token: Token, skip: int = 0) -> None:
        self._lines = _code_lines(token.content)
        self._lexer = token.info.strip().partition(" ")[0] or "text"
        self._skip = skip

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        syntax = Syntax("", self._lexer, theme=CODE_THEME, word_wrap=True)
        highlighted = syntax.highlight("\n".join(self._lines))
        for line in highlighted.split("\n", allow_blank=True)[self._skip : len(self._lines)]:
            yield Padding(line, (0, 1), style=line.style, expand=True)


class _NestedCode(CodeBlock):
    """Code inside a list or a quotation, drawn like any other."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        token = Token("fence", "code", 0, content=str(self.text), info=self.lexer_name)
        yield _Code(token)


class _List(ListElement):
    """A list whose numbers take the same room whatever its length."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.list_type == "bullet_list_open":
            yield from super().__rich_console__(console, options)
            return
        first = self.list_start or 0
        last = max(LIST_NUMBERS_UP_TO, first + len(self.items))
        for index, item in enumerate(self.items):
            yield from item.render_number(console, options, first + index, last)


class _Tokens(Markdown):
    """rich's Markdown over tokens that are parsed already."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "fence": _NestedCode,
        "code_block": _NestedCode,
        "bullet_list_open": _List,
        "ordered_list_open": _List,
    }

    def __init__(self, tokens: Sequence[Token]) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = list(tokens)
