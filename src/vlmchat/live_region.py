"""The rows at the bottom of the terminal that still change; all above them scroll away for good.

Called by `output` while an answer streams. Draws with one write, only the rows that differ, inside
a synchronized update, so nothing flickers. Rows that would not fit on the screen are held back
from the top until they are settled, so none is ever scrolled away and then drawn again.

Convention: after a draw the cursor stands on the last changing row, or at the start of an empty
row if there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from vlmchat.markdown_stream import Row

# Private modes of xterm and its kin; terminals ignore those that they do not know.
_BEGIN = "\x1b[?2026h\x1b[?7l"  # show the update as one; a row that is too long must not wrap
_END = "\x1b[?7h\x1b[?2026l"
_ERASE_REST_OF_ROW = "\x1b[K"
_ERASE_BELOW = "\x1b[J"
_UP = "\x1b[A"


class LiveRegion:
    """Draws settled rows once and keeps the changing ones up to date below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: Sequence[Row] = ()
        self._width = console.width

    def draw(self, settled: Sequence[Row], live: Sequence[Row]) -> None:
        """Put `settled` for good where the changing rows begin, and `live` below."""
        width, height = self._console.size
        live = live[-max(1, height - 1) :]
        rows = [*settled, *live]
        cursor = max(0, len(self._shown) - 1)
        same = _common_prefix(self._shown, rows)
        if width != self._width:
            cursor, same = self._cursor_after_resize(width), 0
        text = _update(rows, same, len(self._shown), cursor, width)
        if rows and not live:
            text += "\n"
        self._shown, self._width = live, width
        if text:
            self._console.file.write(_BEGIN + text + _END)
            self._console.file.flush()

    def _cursor_after_resize(self, width: int) -> int:
        """Most terminals break rows that became too long, and keep the cursor in its text."""
        taken = sum(max(1, -(-row.cells // width)) for row in self._shown)
        return max(0, taken - 1)


def _update(rows: Sequence[Row], same: int, shown: int, cursor: int, width: int) -> str:
    """What turns `shown` rows, the cursor on row `cursor`, into `rows`; `same` rows stay."""
    new = rows[same:]
    if same == shown > 0:
        return "".join("\n" + _drawn(row, width) for row in new)
    text = _UP * (cursor - same) + "\r"
    if not new:
        return text + _ERASE_BELOW + (_UP if same else "")
    text += "\n".join(_drawn(row, width) for row in new)
    if shown > len(rows) or cursor >= len(rows):
        text += "\n" + _ERASE_BELOW + _UP
    return text


def _drawn(row: Row, width: int) -> str:
    # On a full row the cursor rests on the last cell, and erasing from there would eat it.
    return row.ansi + (_ERASE_REST_OF_ROW if row.cells < width else "")


def _common_prefix(left: Sequence[Row], right: Sequence[Row]) -> int:
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count
