"""The clipboard through real processes: small scripts stand in for wl-clipboard and xclip."""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image as PILImage

from vlmchat.clipboard import copy_text, read_clipboard_image
from vlmchat.config import ImagePolicy
from vlmchat.errors import FetchRefused, ImageNotFound, TerminalError
from vlmchat.images import ImageLoader

pytestmark = pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="uses wl-paste, xclip")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_read_clipboard_image_takes_the_best_type_that_is_offered(programs: Path) -> None:
    install(
        programs,
        "wl-paste",
        'if [ "$1" = --list-types ]; then echo text/html; echo image/jpeg; echo image/png; '
        'else printf "bytes of %s" "$2"; fi',
    )
    assert read_clipboard_image() == b"bytes of image/png"


def test_read_clipboard_image_asks_xclip_when_wayland_is_not_there(programs: Path) -> None:
    install(programs, "wl-paste", "exit 1")
    install(
        programs,
        "xclip",
        'if [ "$5" = TARGETS ]; then echo image/bmp; else printf "bytes of %s" "$5"; fi',
    )
    assert read_clipboard_image() == b"bytes of image/bmp"


def test_read_clipboard_image_tells_when_it_holds_text(programs: Path) -> None:
    install(programs, "wl-paste", "echo text/plain")
    with pytest.raises(ImageNotFound, match="holds no picture"):
        read_clipboard_image()


def test_read_clipboard_image_tells_what_to_install(programs: Path) -> None:
    with pytest.raises(TerminalError, match=r"install wl-clipboard .* or xclip"):
        read_clipboard_image()


def test_read_clipboard_image_tells_when_no_desktop_answers(programs: Path) -> None:
    install(programs, "xclip", "exit 1")
    with pytest.raises(ImageNotFound, match="no desktop"):
        read_clipboard_image()


def test_load_clipboard_decodes_what_it_reads(programs: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PILImage.new("RGB", (3, 2)).save(path)
    install(programs, "wl-paste", f"[ $1 = --list-types ] && echo image/png || /bin/cat {path}")
    image = ImageLoader(ImagePolicy()).load_clipboard()
    assert (image.source, image.width, image.height) == ("clipboard", 3, 2)


def test_load_clipboard_is_refused_for_remote_clients() -> None:
    with pytest.raises(FetchRefused):
        ImageLoader(ImagePolicy(allow_local_files=False)).load_clipboard()


def test_copy_text_hands_the_text_to_a_program(programs: Path, tmp_path: Path) -> None:
    install(programs, "wl-copy", f"/bin/cat > {tmp_path / 'copied'}")
    assert copy_text("grüß dich") == "wl-copy"
    assert (tmp_path / "copied").read_text("utf-8") == "grüß dich"


def test_copy_text_does_not_wait_for_a_program_that_stays(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(programs, "xclip", f"/bin/cat > {tmp_path / 'copied'}; /bin/sleep 60 & echo $! > pid")
    monkeypatch.chdir(tmp_path)
    try:
        assert copy_text("text") == "xclip"
    finally:
        os.kill(int((tmp_path / "pid").read_text()), 9)


def test_copy_text_falls_back_to_the_terminal(programs: Path) -> None:
    install(programs, "wl-copy", "exit 1")
    terminal = Terminal()
    assert copy_text("grüß dich", terminal) == "terminal (OSC 52)"
    start, data = terminal.getvalue()[:-1].rsplit(";", 1)
    assert start == "\x1b]52;c"
    assert base64.b64decode(data).decode() == "grüß dich"


def test_copy_text_refuses_what_a_terminal_would_cut(programs: Path) -> None:
    with pytest.raises(TerminalError, match="80000 bytes are more than a terminal copies"):
        copy_text("x" * 80_000, Terminal())


@pytest.mark.parametrize("terminal", [None, io.StringIO()], ids=["none", "not-a-terminal"])
def test_copy_text_tells_what_to_install(programs: Path, terminal: io.StringIO | None) -> None:
    with pytest.raises(TerminalError, match="install wl-clipboard"):
        copy_text("text", terminal)
