"""Show a picture in the terminal, where the terminal can.

Called by the REPL and the chat command after a picture was attached. What the terminal can do is
told by its environment variables alone: a question to the terminal is answered on stdin, where the
answer, which may be late, mixes with what is being typed or piped in.

The four ways are written out here because no library fits: textual-image puts such questions when
it is imported and knows no iTerm2, term-image holds Pillow below 11, chafa.py needs a C library.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Literal

from PIL import Image as PILImage
from rich.color import Color
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from vlmchat.conversation import Image

Protocol = Literal["kitty", "iterm2", "sixel", "blocks"]

_MAX_ROWS = 16
_CELL_ASPECT = 2  # a character cell is about twice as high as wide
_CELL_HEIGHT_PX = 20  # where the terminal does not say
_KITTY_CHUNK = 4096  # kitty graphics protocol: base64 characters per escape sequence
_SIXEL_COLOURS = 256
_SIXEL_EMPTY = 63  # "?": no pixel of the six in this column


def show(image: Image, console: Console, env: Mapping[str, str]) -> bool:
    """Print `image` at most a third of the screen (and 16 rows) high; False if it was not shown.

    env: the terminal's environment variables (TERM, TERM_PROGRAM, NO_COLOR …). Raises nothing.
    A console that records (for an SVG) gets half blocks without being a terminal.
    """
    protocol = choose_protocol(env)
    if protocol is None or console.no_color or console.color_system is None:
        return False
    try:
        if console.record:
            protocol = "blocks"
        elif not console.file.isatty():
            return False
        if protocol == "blocks" and not console.encoding.lower().startswith("utf"):
            return False
        _print(image.pixels, protocol, console)
    except (OSError, ValueError, MemoryError):  # the terminal is gone; a missing picture is no loss
        return False
    return True


def choose_protocol(env: Mapping[str, str]) -> Protocol | None:
    """The best way to show pictures that the terminal's variables promise, or None."""
    term, program = env.get("TERM", ""), env.get("TERM_PROGRAM", "")
    if env.get("NO_COLOR") or term == "dumb":
        return None
    if env.get("TMUX") or env.get("STY") or term.startswith(("tmux", "screen")):
        return "blocks"  # the variables below are then those of a terminal further out
    if env.get("KITTY_WINDOW_ID") or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or env.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    if term.startswith(("foot", "mlterm")) or "sixel" in term:
        return "sixel"
    return "blocks"


def _print(pixels: PILImage.Image, protocol: Protocol, console: Console) -> None:
    columns, rows = _size_in_cells(pixels, console.width, console.height)
    if protocol == "blocks":
        console.print(Segments(_half_blocks(pixels, columns, rows)), end="")
        return
    cell_height_px = _cell_height_px(console)
    small = pixels.copy()
    small.thumbnail((max(1, columns * cell_height_px // _CELL_ASPECT), rows * cell_height_px))
    match protocol:
        case "kitty":
            sequence = _kitty(small, columns, rows)
        case "iterm2":
            sequence = _iterm2(small, columns, rows)
        case "sixel":
            sequence = _sixel(small)
    console.file.write(f"{sequence}\n")
    console.file.flush()


def _size_in_cells(pixels: PILImage.Image, max_columns: int, screen_rows: int) -> tuple[int, int]:
    """(columns, rows) that keep the picture's proportions."""
    rows = max(1, min(_MAX_ROWS, screen_rows // 3))
    columns_per_row = _CELL_ASPECT * pixels.width / pixels.height
    columns = max(1, min(max_columns, round(rows * columns_per_row)))
    return columns, max(1, min(rows, round(columns / columns_per_row)))


def _cell_height_px(console: Console) -> int:
    try:
        import fcntl
        import termios

        size = fcntl.ioctl(console.file.fileno(), termios.TIOCGWINSZ, bytes(8))
    except (ImportError, OSError):  # no such call on Windows, or not a real terminal
        return _CELL_HEIGHT_PX
    rows, _, _, height_px = struct.unpack("4H", size)
    return height_px // rows if rows and height_px >= rows else _CELL_HEIGHT_PX


def _half_blocks(pixels: PILImage.Image, columns: int, rows: int) -> Iterator[Segment]:
    """Each cell shows two pixels: the upper one is its ink, the lower one its background."""
    data = pixels.resize((columns, rows * 2)).tobytes()
    stride = columns * 3
    for top in range(0, len(data), 2 * stride):
        for x in range(top, top + stride, 3):
            ink, ground = data[x : x + 3], data[x + stride : x + stride + 3]
            yield Segment("▀", Style(color=Color.from_rgb(*ink), bgcolor=Color.from_rgb(*ground)))
        yield Segment.line()


def _base64_png(pixels: PILImage.Image) -> str:
    encoded = BytesIO()
    pixels.save(encoded, "PNG")
    return base64.b64encode(encoded.getvalue()).decode("ascii")


def _kitty(pixels: PILImage.Image, columns: int, rows: int) -> str:
    """Source: kitty's terminal graphics protocol; q=2 asks for no answer."""
    data = _base64_png(pixels)
    chunks = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    keys = [f"a=T,f=100,q=2,c={columns},r={rows},", *["q=2,"] * (len(chunks) - 1)]
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(
        f"\x1b_G{key}m={flag};{chunk}\x1b\\"
        for key, flag, chunk in zip(keys, more, chunks, strict=True)
    )


def _iterm2(pixels: PILImage.Image, columns: int, rows: int) -> str:
    """Source: iTerm2's inline images protocol."""
    return f"\x1b]1337;File=inline=1;width={columns};height={rows}:{_base64_png(pixels)}\a"


def _sixel(pixels: PILImage.Image) -> str:
    """Source: DEC's sixel format: bands of six rows, each drawn once per colour in it."""
    indexed = pixels.quantize(_SIXEL_COLOURS)
    width, height = indexed.size
    palette = indexed.getpalette("RGB") or []
    out = [f'\x1bP0;1q"1;1;{width};{height}']
    for index in range(len(palette) // 3):
        red, green, blue = (round(level / 2.55) for level in palette[3 * index : 3 * index + 3])
        out.append(f"#{index};2;{red};{green};{blue}")
    data = indexed.tobytes()
    for top in range(0, height, 6):
        band = data[top * width : (top + 6) * width]
        out.append("$".join(_sixel_lines(band, width)) + "-")
    return "".join(out) + "\x1b\\"


def _sixel_lines(band: bytes, width: int) -> Iterator[str]:
    lines: dict[int, bytearray] = {}
    for position, colour in enumerate(band):
        if colour not in lines:
            lines[colour] = bytearray([_SIXEL_EMPTY]) * width
        lines[colour][position % width] += 1 << (position // width)
    for colour, line in lines.items():
        text = line.decode("ascii")
        yield f"#{colour}" + re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", text)
