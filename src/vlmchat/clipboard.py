"""The clipboard: a picture out of it, a text into it.

Called by `images` and the REPL's /paste and /copy. Uses what the system has: Pillow on macOS and
Windows, wl-clipboard or xclip elsewhere. Knows nothing of limits: whoever reads checks the bytes.
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
from io import BytesIO
from typing import TextIO

from vlmchat.errors import ImageNotFound, TerminalError

_TIMEOUT_S = 5.0
_PICTURE_TYPES = (
    "image/png",
    "image/jpeg",
    "image/webp",
    "image/tiff",
    "image/bmp",
    "image/gif",
    "image/avif",
    "image/heic",
)
# (list what there is, read one type); the first that reaches a clipboard is asked.
_READERS = (
    (["wl-paste", "--list-types"], ["wl-paste", "--type"]),
    (
        ["xclip", "-selection", "clipboard", "-o", "-t", "TARGETS"],
        ["xclip", "-selection", "clipboard", "-o", "-t"],
    ),
)
_WRITERS = (
    (["pbcopy"], "utf-8"),
    (["wl-copy"], "utf-8"),
    (["xclip", "-selection", "clipboard"], "utf-8"),
    (["clip.exe"], "utf-16"),
)
_INSTALL = "install wl-clipboard (Wayland) or xclip (X11)"
_OSC52_MAX_BYTES = 74_994  # what xterm takes, and what base64 makes of it is within others' limits


def read_clipboard_image() -> bytes:
    """The encoded picture that the clipboard holds.

    Raises ImageNotFound when it holds none, TerminalError when it cannot be reached.
    """
    if sys.platform in ("darwin", "win32"):
        return _read_with_pillow()
    reached = False
    for list_types, read in _READERS:
        offered = _run(list_types)
        if offered is None:
            continue
        reached = True
        held = offered.decode("utf-8", "replace").split()
        kind = next((kind for kind in _PICTURE_TYPES if kind in held), None)
        data = _run([*read, kind]) if kind else None
        if data:
            return data
    if reached:
        raise ImageNotFound("the clipboard holds no picture; copy one and try again")
    if any(shutil.which(list_types[0]) for list_types, _ in _READERS):
        raise ImageNotFound("the clipboard is empty or there is no desktop to read it from")
    raise TerminalError(f"the clipboard cannot be read; {_INSTALL}")


def copy_text(text: str, terminal: TextIO | None = None) -> str:
    """Put `text` into the clipboard; returns how: a program's name, or "terminal (OSC 52)".

    terminal: where to ask the terminal to do it when no program can (works over ssh too).
    Raises TerminalError when nothing can, or the text is too long for the terminal.
    """
    for command, encoding in _WRITERS:
        if _run(command, text.encode(encoding, "replace")) is not None:
            return command[0]
    if terminal is None or not terminal.isatty():
        raise TerminalError(f"the clipboard cannot be written; {_INSTALL}")
    data = text.encode("utf-8", "replace")
    if len(data) > _OSC52_MAX_BYTES:
        raise TerminalError(
            f"{len(data)} bytes are more than a terminal copies ({_OSC52_MAX_BYTES}); {_INSTALL}"
        )
    terminal.write(f"\x1b]52;c;{base64.b64encode(data).decode('ascii')}\a")
    terminal.flush()
    return "terminal (OSC 52)"


def _run(command: list[str], data: bytes | None = None) -> bytes | None:
    """The program's output (nothing while writing), or None if it is absent, fails or hangs."""
    program = shutil.which(command[0])
    if program is None:
        return None
    # A writer stays behind to serve the clipboard: its output must not be a pipe we wait for.
    output = subprocess.PIPE if data is None else subprocess.DEVNULL
    try:
        done = subprocess.run(
            [program, *command[1:]],
            input=data if data is not None else b"",
            stdout=output,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout or b""


def _read_with_pillow() -> bytes:  # pragma: no cover -- macOS and Windows only
    from PIL import Image, ImageGrab

    try:
        held = ImageGrab.grabclipboard()
    except (OSError, NotImplementedError, ValueError) as error:
        raise TerminalError(f"the clipboard cannot be read: {error}") from None
    if isinstance(held, list) and held:
        raise ImageNotFound(f"the clipboard holds a file, not a picture; use its path: {held[0]}")
    if not isinstance(held, Image.Image):
        raise ImageNotFound("the clipboard holds no picture; copy one and try again")
    encoded = BytesIO()
    held.save(encoded, "PNG")
    return encoded.getvalue()
