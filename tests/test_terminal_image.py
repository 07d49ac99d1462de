"""Pictures in terminals: which way is chosen, and what is written."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image as PILImage
from rich.console import Console

from vlmchat.config import ImagePolicy
from vlmchat.conversation import Image
from vlmchat.images import ImageLoader
from vlmchat.terminal_image import Protocol, choose_protocol, show


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def picture(width: int = 60, height: int = 30) -> Image:
    """Left half red, right half blue."""
    pixels = PILImage.new("RGB", (width, height), (255, 0, 0))
    pixels.paste((0, 0, 255), (width // 2, 0, width, height))
    data = io.BytesIO()
    pixels.save(data, "PNG")
    return ImageLoader(ImagePolicy()).load_bytes(data.getvalue(), "test")


def console(file: io.StringIO, width: int = 80, height: int = 24, **options: bool) -> Console:
    return Console(
        file=file,
        width=width,
        height=height,
        force_terminal=True,
        color_system="truecolor",
        _environ={},
        **options,  # type: ignore[arg-type]
    )


def written(env: dict[str, str], image: Image | None = None) -> str:
    file = Terminal()
    assert show(image or picture(), console(file), {"TERM": "xterm", **env})
    return file.getvalue()


@pytest.mark.parametrize(
    ("env", "protocol"),
    [
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, "blocks"),
        ({"TERM": "dumb"}, None),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, None),
    ],
)
def test_choose_protocol_goes_by_the_terminals_variables(
    env: dict[str, str], protocol: Protocol | None
) -> None:
    assert choose_protocol(env) == protocol


def test_show_draws_half_blocks_within_a_third_of_the_screen() -> None:
    lines = written({}).splitlines()
    assert len(lines) == 8
    assert all(line.count("▀") == 32 for line in lines)  # twice as wide as high, cells 1:2
    assert lines[0].startswith("\x1b[38;2;255;0;0;48;2;255;0;0m▀")


def test_show_fits_a_wide_picture_into_the_width() -> None:
    lines = written({}, picture(width=1000, height=10)).splitlines()
    assert len(lines) == 1
    assert lines[0].count("▀") == 80


def test_show_fits_a_tall_picture_into_sixteen_rows() -> None:
    file = Terminal()
    assert show(picture(10, 1000), console(file, height=90), {"TERM": "xterm"})
    assert len(file.getvalue().splitlines()) == 16


def test_show_sends_kitty_a_png_in_chunks_that_ask_for_no_answer() -> None:
    noisy = PILImage.effect_noise((300, 150), 90).convert("RGB")
    data = io.BytesIO()
    noisy.save(data, "PNG")
    image = ImageLoader(ImagePolicy()).load_bytes(data.getvalue(), "test")
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", written({"TERM": "xterm-kitty"}, image))
    assert len(chunks) > 1
    assert chunks[0][0] == "a=T,f=100,q=2,c=32,r=8,m=1"
    assert [keys[-3:] for keys, _ in chunks] == ["m=1"] * (len(chunks) - 1) + ["m=0"]
    assert all("q=2" in keys and len(part) <= 4096 for keys, part in chunks)
    sent = PILImage.open(io.BytesIO(base64.b64decode("".join(part for _, part in chunks))))
    assert sent.size == (300, 150)


def test_show_sends_iterm2_a_png_inline() -> None:
    sequence = written({"TERM_PROGRAM": "iTerm.app"})
    match = re.fullmatch(r"\x1b]1337;File=inline=1;width=32;height=8:(.*)\a\n", sequence)
    assert match is not None
    assert PILImage.open(io.BytesIO(base64.b64decode(match[1]))).size == (60, 30)


def test_show_sends_sixels_that_decode_to_the_picture() -> None:
    pixels = decode_sixel(written({"TERM": "foot"}))
    assert pixels.size == (60, 30)
    assert [pixels.getpixel(xy) for xy in [(0, 0), (29, 29), (30, 0), (59, 29)]] == [
        *[(255, 0, 0)] * 2,
        *[(0, 0, 255)] * 2,
    ]


def decode_sixel(text: str) -> PILImage.Image:
    """A reader of its own, after DEC's description, to check the writer with."""
    header = re.match(r'\x1bP0;1q"1;1;(\d+);(\d+)', text)
    assert header is not None
    pixels = PILImage.new("RGB", (int(header[1]), int(header[2])))
    palette: dict[str, tuple[int, int, int]] = {}
    colour, repeat, x, top = "", 1, 0, 0
    for define, select, count, char, control in re.findall(
        r"#(\d+;2;\d+;\d+;\d+)|#(\d+)|!(\d+)(?=.)|([?-~])|([$-])",
        text[header.end() :].removesuffix("\x1b\\\n"),
    ):
        if define:
            name, _, *levels = define.split(";")
            red, green, blue = (round(int(level) * 2.55) for level in levels)
            palette[name] = (red, green, blue)
        elif select:
            colour = select
        elif count:
            repeat = int(count)
        elif char:
            for _ in range(repeat):
                for bit in range(6):
                    if (ord(char) - 63) >> bit & 1:
                        pixels.putpixel((x, top + bit), palette[colour])
                x += 1
            repeat = 1
        else:
            x, top = 0, top + 6 * (control == "-")
    return pixels


def test_show_keeps_silent_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    assert not show(picture(), console(file), {"TERM": "xterm"})
    assert file.getvalue() == ""


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_show_keeps_silent_without_colour(env: dict[str, str]) -> None:
    file = Terminal()
    assert not show(picture(), console(file), env)
    assert file.getvalue() == ""


def test_show_keeps_silent_where_blocks_cannot_be_written() -> None:
    file = Terminal()
    file.encoding = "latin-1"
    assert not show(picture(), console(file), {"TERM": "xterm"})
    assert file.getvalue() == ""


def test_show_survives_a_terminal_that_went_away() -> None:
    file = Terminal()
    lost = console(file)
    file.close()
    assert not show(picture(), lost, {"TERM": "xterm-kitty"})


def test_show_draws_blocks_into_a_recording() -> None:
    recording = console(io.StringIO(), record=True)
    assert show(picture(), recording, {"TERM": "xterm-kitty"})
    assert "▀" in recording.export_text()
