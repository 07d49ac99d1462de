"""Pictures from files, URLs, data URLs, stdin and the clipboard, checked before they are decoded.

Called by the commands, the REPL and the servers, each with its own `ImagePolicy`. What leaves here
is an `Image`: RGB, upright, opaque. Knows nothing of models or of how pictures are shown.

Not covered: decoding runs in this process, in Pillow and its codecs, without a time limit.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import importlib
import math
import os
import re
import shlex
import stat
import sys
import warnings
from io import BytesIO
from pathlib import PurePath
from typing import BinaryIO, cast
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from PIL import Image as PILImage
from PIL import ImageChops, ImageOps, UnidentifiedImageError

from vlmchat.clipboard import read_clipboard_image
from vlmchat.config import ImagePolicy
from vlmchat.conversation import Image
from vlmchat.errors import FetchRefused, ImageNotFound, ImageRejected
from vlmchat.shown import shown, shown_bytes

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")  # and HEIF, by its plug-in
_PICTURE_END = re.compile(
    r"\.(jpe?g|jpe|jfif|a?png|webp|gif|tiff?|bmp|dib|avif|hei[cf])(?=\s|$)", re.IGNORECASE
)
_NOT_SPACE = re.compile(r"\S+")
_MAX_PATH_CHARACTERS = 4096
_READS = "JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF or HEIC"
_DATA_URL = re.compile(r"data:[^,;]*(?P<options>[^,]*),(?P<payload>.*)", re.I | re.DOTALL)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_WITH_ALPHA = ("RGBA", "RGBa", "LA", "PA")
# A word as a shell reads it: terminals quote the names of dropped files so.
_WORD = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+""")


class ImageLoader:
    """Makes an `Image` of whatever a person or a client points at, within one policy.

    stdin: where the source `-` reads from; the process's own by default.
    """

    def __init__(self, policy: ImagePolicy, stdin: BinaryIO | None = None) -> None:
        # Pillow remarks on oddities in files; here a picture is accepted or refused, in one line.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._policy = policy
        self._stdin = stdin
        self._stdin_was_read = False

    def load(self, source: str) -> Image:
        """The picture at a path, a file, http(s) or data URL, or on stdin (`-`).

        Raises ImageNotFound, ImageRejected, FetchRefused, NetworkError.
        """
        scheme = source.partition(":")[0].lower()
        if scheme == "data":
            return self.load_bytes(self._from_data_url(source), "data URL")
        if scheme in ("http", "https"):
            from vlmchat.fetch import fetch  # an HTTP client takes as long to import as Pillow

            return self.load_bytes(fetch(source, self._policy), source)
        if "://" in source and scheme != "file":
            raise FetchRefused(f"{shown(source)}: only http, https, data and file URLs are read")
        if not self._policy.allow_local_files:
            raise FetchRefused(
                f"{shown(source)}: not a URL; only http, https and data URLs are read"
            )
        if source == "-":
            return self.load_bytes(self._from_stdin(), source)
        path = _path_of_file_url(source) if scheme == "file" else os.path.expanduser(source)
        return self.load_bytes(self._from_file(path), source)

    def load_clipboard(self) -> Image:
        """The picture on the clipboard. Raises ImageNotFound, ImageRejected, TerminalError."""
        if not self._policy.allow_local_files:
            raise FetchRefused("the clipboard is not read for remote clients")
        return self.load_bytes(read_clipboard_image(), "clipboard")

    def load_bytes(self, data: bytes, source: str) -> Image:
        """The picture encoded in `data`; `source` names it in errors. Raises ImageRejected."""
        name = shown(source)
        if not data:
            raise ImageRejected(f"{name} is empty: 0 bytes")
        self._check_size(len(data), name)
        pixels = _decode(data, name, self._policy.max_pixels)
        return Image(
            pixels=pixels,
            data=data,
            source=source,
            sha256=hashlib.sha256(data).hexdigest(),
            digest=_digest(pixels),
        )

    def _check_size(self, num_bytes: int, name: str) -> None:
        if num_bytes > self._policy.max_bytes:
            raise ImageRejected(
                f"{name} has {shown_bytes(num_bytes)}, the limit is "
                f"{shown_bytes(self._policy.max_bytes)}; raise --max-image-bytes"
            )

    def _from_file(self, path: str) -> bytes:
        name = shown(path)
        try:
            with open(path, "rb", opener=_open_without_waiting) as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode):
                    raise ImageRejected(f"{name} is a device or a pipe, not a file")
                self._check_size(info.st_size, name)
                return file.read(self._policy.max_bytes + 1)
        except IsADirectoryError:
            raise ImageRejected(f"{name} is a directory; give a picture in it") from None
        except (FileNotFoundError, NotADirectoryError):
            raise ImageNotFound(f"{name.strip() or 'the empty path'}: no such file") from None
        except PermissionError:
            raise ImageRejected(f"{name} may not be read: permission denied") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ImageNotFound(f"{name} cannot be opened: {reason}") from None

    def _from_stdin(self) -> bytes:
        if self._stdin_was_read:
            raise ImageNotFound("stdin was read already: `-` can name one picture only")
        stdin = self._stdin if self._stdin is not None else getattr(sys.stdin, "buffer", None)
        if stdin is None or stdin.isatty():
            raise ImageNotFound("stdin holds no picture: pipe one into it, or give a path")
        self._stdin_was_read = True
        data = stdin.read(self._policy.max_bytes + 1)
        if len(data) > self._policy.max_bytes:
            limit = shown_bytes(self._policy.max_bytes)
            raise ImageRejected(f"stdin has more than {limit}; raise --max-image-bytes")
        if not data:
            raise ImageNotFound("stdin holds no picture: 0 bytes")
        return data

    def _from_data_url(self, url: str) -> bytes:
        parts = _DATA_URL.fullmatch(url)
        if parts is None or ";base64" not in parts["options"].lower():
            raise ImageRejected(f"{shown(url)}: not of the form data:image/…;base64,…")
        payload = parts["payload"]
        self._check_size(len(payload) * 3 // 4 - payload[-2:].count("="), "the data URL")
        encoded = b"".join(unquote_to_bytes(payload).split())
        try:
            return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise ImageRejected("the data URL holds something that is not base64") from None


def split_image_sources(line: str) -> tuple[list[str], str]:
    """What of a typed, pasted or dropped line names pictures, and the text that is left.

    A picture is an existing file with a picture's suffix (plain, quoted, with escaped spaces, or
    as a file:// URL), an http(s) URL whose path has one, or a data:image URL. All else stays.
    """
    sources: list[str] = []
    text: list[str] = []
    position = 0
    while word := _NOT_SPACE.search(line, position):
        source, end = _source_at(line, word.start(), word.end())
        text.append(line[position : end if source is None else word.start()])
        if source is not None:
            sources.append(source)
            end += len(line[end:]) - len(line[end:].lstrip(" \t"))
        position = end
    return sources, ("".join(text) + line[position:]).strip() if sources else line


def _source_at(line: str, start: int, end: int) -> tuple[str | None, int]:
    """The picture named at `start` and where its name ends; or None and the end of the word."""
    if _names_a_picture(line[start:end]):
        return line[start:end], end
    limit = start + _MAX_PATH_CHARACTERS
    if quoted := _WORD.match(line, start, limit):
        name = "".join(shlex.split(quoted[0]))
        if _names_a_picture(name):
            return name, quoted.end()
    # Nobody may have escaped the path's spaces: try up to the next word with a picture's suffix.
    line_end = line.find("\n", end, limit)
    further = _PICTURE_END.search(line, end, line_end if line_end >= 0 else limit)
    if further and _names_a_picture(line[start : further.end()]):
        return line[start : further.end()], further.end()
    return None, end


def _names_a_picture(name: str) -> bool:
    scheme = name.partition(":")[0].lower()
    if scheme == "data":
        return name[:11].lower() == "data:image/" and "," in name and not re.search(r"\s", name)
    if scheme in ("http", "https"):
        return not re.search(r"\s", name) and _has_picture_suffix(_url_path(name))
    path = _path_of_file_url(name) if scheme == "file" else os.path.expanduser(name)
    try:
        return _has_picture_suffix(path) and os.path.isfile(path)
    except ValueError:  # a NUL in it
        return False


def _has_picture_suffix(path: str) -> bool:
    return _PICTURE_END.fullmatch(PurePath(path).suffix) is not None


def _url_path(url: str) -> str:
    try:
        return unquote(urlsplit(url).path)
    except ValueError:
        return ""


def _path_of_file_url(url: str) -> str:
    """The path in file:///a%20b, file://localhost/a or file:/a."""
    from urllib.request import url2pathname  # the same

    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    return url2pathname(parts.path) if parts.netloc in ("", "localhost") else url


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a FIFO without a writer would hang


def _decode(data: bytes, name: str, max_pixels: int) -> PILImage.Image:
    """Encoded bytes -> RGB pixels, upright, opaque; the header is judged before any pixel."""
    opened = _open(data, name)
    width, height = opened.size
    if width < 1 or height < 1:
        raise ImageRejected(f"{name} has no pixels: it is {width}x{height}")
    if width * height > max_pixels:
        raise ImageRejected(
            f"{name} is {width}x{height} pixels ({_megapixels(width * height)}), the limit is "
            f"{_megapixels(max_pixels)}; resize it or raise --max-image-pixels"
        )
    try:
        opened.load()
        return _to_rgb(_upright(opened))
    except MemoryError:
        raise ImageRejected(f"{name}: not enough memory for {width}x{height} pixels") from None
    except Exception as error:  # decoders raise whatever a broken file makes them trip over
        raise _broken(data, name, error) from None


def _open(data: bytes, name: str) -> PILImage.Image:
    formats = list(_FORMATS)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        _register_heif(name)
        formats.append("HEIF")
    try:
        return PILImage.open(BytesIO(data), formats=formats)
    except PILImage.DecompressionBombError as error:  # Pillow's own limit, which no option lifts
        pixels, limit = (_megapixels(int(number)) for number in re.findall(r"\d+", str(error))[:2])
        raise ImageRejected(f"{name} has {pixels}, {limit} is the most; resize it") from None
    except UnidentifiedImageError:
        raise ImageRejected(f"{name} {_what_else(data)}") from None
    except Exception as error:  # see _decode
        raise _broken(data, name, error) from None


def _register_heif(name: str) -> None:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        raise ImageRejected(f"{name} is a HEIC picture; to read it, install pillow-heif") from None


def _what_else(data: bytes) -> str:
    """What to say of bytes in which Pillow found none of our formats."""
    start = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "is an HTML page, not a picture; give the address of the picture itself"
    if b"<svg" in start:
        return f"is an SVG drawing; convert it to PNG (vlmchat reads {_READS})"
    if start.startswith(b"%pdf-"):
        return f"is a PDF document; export the page as PNG (vlmchat reads {_READS})"
    if (
        data.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*"))
        or data[8:12] == b"WEBP"
        or data[4:11] == b"ftypavi"
    ):
        return "is broken: it begins like a picture, but its header makes no sense or is cut off"
    if _is_text(data[:4096]):
        return f"is text, not a picture (vlmchat reads {_READS})"
    return f"is not a picture of a known format (vlmchat reads {_READS})"


def _is_text(start: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # may end inside a character
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def _broken(data: bytes, name: str, error: Exception) -> ImageRejected:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    if re.search("truncated|end of file", reason) or isinstance(error, EOFError) or _is_cut(data):
        return ImageRejected(f"{name} is cut off: the file ends before the picture does")
    return ImageRejected(f"{name} is broken: {reason}")


def _is_cut(data: bytes) -> bool:
    """Whether the file says of itself that it should be longer."""
    if data[:4] == b"RIFF":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    return data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-64:]


def _upright(image: PILImage.Image) -> PILImage.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing; the pixels are as good as ever
        return image


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    """8-bit RGB over white, a fresh picture without metadata."""
    if image.mode in _WIDE_GREY:
        image = _to_8_bit(image)
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16-bit RGB, which Pillow reads as 8-bit
        image.info["transparency"] = tuple(level >> 8 for level in key)
    if image.mode in _WITH_ALPHA or key is not None:
        layer = image.convert("RGBA")
        rgb = PILImage.new("RGB", image.size, "white")
        rgb.paste(layer, mask=layer.getchannel("A"))
        return rgb
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _to_8_bit(image: PILImage.Image) -> PILImage.Image:
    """Greys of more than 8 bits: the range of their type becomes 0..255, nothing is clipped.

    16-bit values count to 65535, and floats to 1 or 255; what goes beyond is stretched between
    its own darkest and lightest value. A transparent grey becomes an alpha channel.
    """
    wide = image if image.mode == "F" else image.convert("I")
    low, high = cast(tuple[float, float], wide.getextrema())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("its pixels are not numbers")
    tops = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    bottom, span = (0.0, top) if top is not None else (low, (high - low) or 1.0)
    scale = 255 / span
    grey = (
        wide.convert("F").point(lambda value: value * scale + (0.5 - bottom * scale)).convert("L")
    )
    grey.info = {}
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(_differs_from(wide, transparent))
    return grey


def _differs_from(wide: PILImage.Image, value: int) -> PILImage.Image:
    """255 where the pixel is not `value`, else 0."""
    above = wide.point(lambda pixel: pixel * 1 - value).convert("L")  # conversion clips at 0
    below = wide.point(lambda pixel: pixel * -1 + value).convert("L")
    return ImageChops.lighter(above, below).point(lambda difference: 255 if difference else 0)


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:.4g} MP"


def _digest(pixels: PILImage.Image) -> str:
    digest = hashlib.sha256(f"{pixels.mode} {pixels.width}x{pixels.height}\n".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()
