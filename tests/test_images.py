"""Pictures from every source and in every mode; broken ones end in one clear line."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from vlmchat.config import ImagePolicy
from vlmchat.errors import FetchRefused, ImageNotFound, ImageRejected, VlmchatError
from vlmchat.images import ImageLoader, split_image_sources

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def encoded(picture: PILImage.Image, kind: str = "PNG", **options: object) -> bytes:
    data = BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    """The RGB value at (x, y) of the loaded picture."""
    value = load(data).getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def load(data: bytes) -> PILImage.Image:
    return ImageLoader(ImagePolicy()).load_bytes(data, "test").pixels


def near(got: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= 3 for a, b in zip(got, expected, strict=True))


def noise(mode: str = "RGB") -> PILImage.Image:
    random = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return PILImage.fromarray(random).convert(mode)


def exif(orientation: int) -> PILImage.Exif:
    tags = PILImage.Exif()
    tags[0x0112] = orientation
    return tags


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IEND", b"")


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    path.write_bytes(encoded(PILImage.new("RGB", (4, 3), RED)))
    return path


# --- sources


def test_load_opens_a_path_and_names_its_content(png: Path) -> None:
    image = ImageLoader(ImagePolicy()).load(str(png))
    assert (image.width, image.height, image.source) == (4, 3, str(png))
    assert image.data == png.read_bytes()
    assert image.sha256 == hashlib.sha256(image.data).hexdigest()


def test_load_expands_the_home_directory(png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(png.parent))
    assert ImageLoader(ImagePolicy()).load("~/red.png").width == 4


def test_load_opens_a_file_url_with_escapes(tmp_path: Path) -> None:
    path = tmp_path / "my cat.png"
    path.write_bytes(encoded(noise()))
    assert ImageLoader(ImagePolicy()).load(path.as_uri()).width == 40


def test_load_reads_a_data_url_whatever_its_padding() -> None:
    data = encoded(PILImage.new("RGB", (5, 5), RED))
    text = base64.b64encode(data).decode().rstrip("=").replace("+", "%2B")
    image = ImageLoader(ImagePolicy()).load(f"DATA:image/png;base64,{text}")
    assert (image.data, image.source) == (data, "data URL")


@pytest.mark.parametrize("url", ["data:,hello", "data:image/png;base64,!!!!", "data:"])
def test_load_rejects_a_data_url_without_base64(url: str) -> None:
    with pytest.raises(ImageRejected):
        ImageLoader(ImagePolicy()).load(url)


def test_load_rejects_a_long_data_url_before_decoding_it() -> None:
    with pytest.raises(ImageRejected, match=r"data URL has 750 bytes, .* --max-image-bytes"):
        ImageLoader(ImagePolicy(max_bytes=700)).load("data:image/png;base64," + "!" * 1000)


def test_load_reads_stdin_once() -> None:
    loader = ImageLoader(ImagePolicy(), stdin=BytesIO(encoded(noise())))
    assert loader.load("-").source == "-"
    with pytest.raises(ImageNotFound, match="read already"):
        loader.load("-")


def test_load_stops_reading_stdin_at_the_limit() -> None:
    stdin = BytesIO(b"x" * 1000)
    with pytest.raises(ImageRejected, match="stdin has more than 100 bytes"):
        ImageLoader(ImagePolicy(max_bytes=100), stdin=stdin).load("-")
    assert stdin.tell() == 101


def test_load_tells_when_stdin_is_empty() -> None:
    with pytest.raises(ImageNotFound, match="stdin"):
        ImageLoader(ImagePolicy(), stdin=BytesIO()).load("-")


@pytest.mark.parametrize("source", ["", " "])
def test_load_names_an_empty_path(source: str) -> None:
    with pytest.raises(ImageNotFound, match=r"^the empty path: no such file"):
        ImageLoader(ImagePolicy()).load(source)


@pytest.mark.parametrize("source", ["/etc/hostname", "file:///etc/hostname", "-", "~/a.png"])
def test_load_opens_nothing_local_for_remote_clients(source: str) -> None:
    with pytest.raises(FetchRefused):
        ImageLoader(ImagePolicy(allow_local_files=False)).load(source)


def test_load_refuses_private_urls_and_other_schemes() -> None:
    for url in ("http://127.0.0.1/a.png", "HTTPS://localhost/a.png", "ftp://example.com/a.png"):
        with pytest.raises(FetchRefused):
            ImageLoader(ImagePolicy()).load(url)


# --- paths that are no pictures


@pytest.mark.parametrize("path", ["", "/nowhere/a.png", "/dev/null/a.png", "a\0.png", "x" * 5000])
def test_load_tells_when_there_is_no_such_file(path: str) -> None:
    with pytest.raises(ImageNotFound) as failure:
        ImageLoader(ImagePolicy()).load(path)
    assert failure.value.message.isprintable()
    assert len(failure.value.message) < 200


def test_load_tells_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageRejected, match="is a directory"):
        ImageLoader(ImagePolicy()).load(str(tmp_path))


def test_load_does_not_wait_for_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(ImageRejected, match="device or a pipe"):
        ImageLoader(ImagePolicy()).load(str(tmp_path / "fifo.png"))


def test_load_does_not_read_an_endless_device() -> None:
    with pytest.raises(ImageRejected, match="device or a pipe"):
        ImageLoader(ImagePolicy()).load("/dev/zero")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_load_tells_when_a_file_may_not_be_read(png: Path) -> None:
    png.chmod(0)
    with pytest.raises(ImageRejected, match="permission denied"):
        ImageLoader(ImagePolicy()).load(str(png))


def test_load_checks_the_size_of_a_file_before_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: reading it would fill any memory
    with pytest.raises(ImageRejected, match=r"1024 GiB, the limit is 50 MiB; .*--max-image-bytes"):
        ImageLoader(ImagePolicy()).load(str(path))


# --- bytes that are no pictures


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"", "is empty: 0 bytes", id="empty"),
        pytest.param(b"\n<!DOCTYPE html><html>", "is an HTML page", id="html"),
        pytest.param(b"<?xml version='1.0'?><svg>", "SVG drawing; convert it to PNG", id="svg"),
        pytest.param(b"%PDF-1.7\n%\xe2\xe3", "PDF document; export", id="pdf"),
        pytest.param("grüß dich\n".encode(), "is text, not a picture", id="text"),
        pytest.param(b"\0\1\2\3" * 9, "not a picture of a known format", id="binary"),
        pytest.param(encoded(noise(), "ICO"), "not a picture of a known format", id="ico"),
        pytest.param(b"\x89PNG\r\n\x1a\n", "header makes no sense or is cut off", id="png-header"),
        pytest.param(png_header(30_000, 30_000), "has 900 MP, 179 MP is the most", id="bomb"),
    ],
)
def test_load_bytes_tells_what_the_bytes_are_instead(data: bytes, words: str) -> None:
    with pytest.raises(ImageRejected, match=f"^test .*{words}"):
        load(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "HEIF"])
def test_load_bytes_tells_when_a_picture_is_cut_off(kind: str) -> None:
    data = encode_as(kind)
    with pytest.raises(ImageRejected, match="is cut off"):
        load(data[: len(data) * 2 // 3])


def test_load_bytes_tells_when_a_picture_is_corrupt() -> None:
    data = bytearray(encoded(noise()))
    data[60:70] = b"\xff" * 10
    with pytest.raises(ImageRejected, match="is broken"):
        load(bytes(data))


def test_load_bytes_judges_the_header_before_decoding() -> None:
    with pytest.raises(ImageRejected, match=r"9000x9000 pixels \(81 MP\), .* --max-image-pixels"):
        load(png_header(9000, 9000))


def test_load_bytes_keeps_pillows_own_limit_in_place() -> None:
    before = PILImage.MAX_IMAGE_PIXELS
    load(encoded(noise()))
    assert before == PILImage.MAX_IMAGE_PIXELS


# --- what a model gets to see


def encode_as(kind: str) -> bytes:
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    return encoded(noise(), kind)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF"])
def test_load_bytes_reads_every_format_as_plain_rgb(kind: str) -> None:
    pixels = load(encode_as(kind))
    assert (pixels.mode, pixels.size, pixels.info) == ("RGB", (40, 30), {})
    assert type(pixels) is PILImage.Image


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_load_bytes_takes_the_first_frame(kind: str) -> None:
    first, second = (PILImage.new("RGB", (8, 8), colour) for colour in (RED, WHITE))
    data = encoded(first, kind, save_all=True, append_images=[second])
    assert near(pixel(data), RED)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (2, PILImage.Transpose.FLIP_LEFT_RIGHT),
        (3, PILImage.Transpose.ROTATE_180),
        (6, PILImage.Transpose.ROTATE_270),
        (8, PILImage.Transpose.ROTATE_90),
    ],
)
def test_load_bytes_turns_a_photo_upright(
    kind: str, orientation: int, turn: PILImage.Transpose
) -> None:
    photo = PILImage.new("RGB", (64, 32), WHITE)
    photo.paste(RED, (0, 0, 16, 16))
    pixels = load(encoded(photo, kind, exif=exif(orientation)))
    expected = photo.transpose(turn)
    assert pixels.size == expected.size
    for corner in [(4, 4), (pixels.width - 5, 4), (4, pixels.height - 5)]:
        got, wanted = pixels.getpixel(corner), expected.getpixel(corner)
        assert isinstance(got, tuple)
        assert isinstance(wanted, tuple)
        assert near(got, wanted)


def test_load_bytes_reads_a_photo_with_a_broken_exif_block() -> None:
    assert load(encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).size == (40, 30)


@pytest.mark.parametrize(
    ("picture", "options"),
    [
        pytest.param(PILImage.new("RGBA", (2, 2), (9, 9, 9, 0)), {}, id="RGBA"),
        pytest.param(PILImage.new("LA", (2, 2), (9, 0)), {}, id="LA"),
        pytest.param(PILImage.new("L", (2, 2), 5).quantize(2), {"transparency": 0}, id="palette"),
        pytest.param(PILImage.new("L", (2, 2), 7), {"transparency": 7}, id="grey-key"),
        pytest.param(PILImage.new("1", (2, 2), 0), {"transparency": 0}, id="bit-key"),
        pytest.param(PILImage.new("I;16", (2, 2), 700), {"transparency": 700}, id="16-bit-key"),
        pytest.param(
            PILImage.new("RGB", (2, 2), (1, 2, 3)), {"transparency": (1, 2, 3)}, id="RGB-key"
        ),
    ],
)
def test_load_bytes_puts_transparent_pixels_on_white(
    picture: PILImage.Image, options: dict[str, object]
) -> None:
    assert pixel(encoded(picture, "PNG", **options)) == WHITE


def test_load_bytes_reads_the_colour_key_of_a_16_bit_rgb_png() -> None:
    colour = struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    data = png_chunk(b"tRNS", colour) + png_chunk(b"IDAT", zlib.compress(b"\0" + colour))
    assert pixel(b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")) == WHITE


def test_load_bytes_mixes_half_transparent_pixels_with_white() -> None:
    assert near(pixel(encoded(PILImage.new("RGBA", (2, 2), (0, 0, 0, 128)))), (127, 127, 127))


def test_load_bytes_keeps_an_opaque_grey_beside_a_transparent_16_bit_one() -> None:
    grey = PILImage.fromarray(np.array([[0, 256, 65535 // 2]], dtype=np.uint16))
    data = encoded(grey, transparency=256)
    assert [pixel(data, x)[0] for x in range(3)] == [0, 255, 127]


def stored(array: object, kind: str) -> bytes:
    return encoded(PILImage.fromarray(np.array([array])), kind)


@pytest.mark.parametrize(
    ("data", "greys"),
    [
        pytest.param(
            stored(np.array([0, 257, 32768, 65535], np.uint16), "PNG"), [0, 1, 128, 255], id="png"
        ),
        pytest.param(
            stored(np.array([0, 257, 32768, 65535], np.uint16), "TIFF"), [0, 1, 128, 255], id="tiff"
        ),
        pytest.param(
            stored(np.array([0, 65535], np.int32), "TIFF"), [0, 255], id="32-bit-holding-16"
        ),
        pytest.param(
            stored(np.array([-1000, 0, 1000], np.int32), "TIFF"), [0, 128, 255], id="32-bit-signed"
        ),
        pytest.param(
            stored(np.array([0, 0.5, 1], np.float32), "TIFF"), [0, 128, 255], id="float-to-1"
        ),
        pytest.param(
            stored(np.array([0, 100, 255], np.float32), "TIFF"), [0, 100, 255], id="float-to-255"
        ),
        pytest.param(
            stored(np.array([-1, 0, 1], np.float32), "TIFF"), [0, 128, 255], id="float-signed"
        ),
        pytest.param(stored(np.array([7e9, 7e9], np.float32), "TIFF"), [0, 0], id="float-constant"),
    ],
)
def test_load_bytes_scales_wide_greys_to_8_bits(data: bytes, greys: list[int]) -> None:
    assert [pixel(data, x) for x in range(len(greys))] == [(grey,) * 3 for grey in greys]


def test_load_bytes_rejects_pixels_that_are_not_numbers() -> None:
    with pytest.raises(ImageRejected, match="not numbers"):
        load(stored(np.array([np.nan, 1], np.float32), "TIFF"))


@pytest.mark.parametrize(
    ("picture", "kind", "expected"),
    [
        pytest.param(PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", RED, id="cmyk-jpeg"),
        pytest.param(PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", RED, id="cmyk-tiff"),
        pytest.param(PILImage.new("LAB", (8, 8), (255, 128, 128)), "TIFF", WHITE, id="lab"),
        pytest.param(PILImage.new("L", (8, 8), 9), "JPEG", (9, 9, 9), id="grey"),
        pytest.param(PILImage.new("1", (8, 8), 1), "BMP", WHITE, id="bit"),
        pytest.param(PILImage.new("1", (8, 8), 0), "TIFF", BLACK, id="bit-black"),
    ],
)
def test_load_bytes_converts_colour_spaces(
    picture: PILImage.Image, kind: str, expected: tuple[int, ...]
) -> None:
    assert near(pixel(encoded(picture, kind)), expected)


def test_load_bytes_gives_the_same_digest_for_the_same_pixels_only() -> None:
    png = ImageLoader(ImagePolicy()).load_bytes(encoded(noise(), "PNG"), "a")
    bmp = ImageLoader(ImagePolicy()).load_bytes(encoded(noise(), "BMP"), "b")
    turned = ImageLoader(ImagePolicy()).load_bytes(encoded(noise().reduce(2), "PNG"), "c")
    assert png.digest == bmp.digest != turned.digest
    assert png.sha256 != bmp.sha256


def test_load_bytes_tells_wide_pictures_from_tall_ones_of_the_same_bytes() -> None:
    wide, tall = (encoded(PILImage.new("RGB", size, RED)) for size in ((2, 8), (8, 2)))
    loader = ImageLoader(ImagePolicy())
    assert loader.load_bytes(wide, "a").digest != loader.load_bytes(tall, "b").digest


# --- whatever the bytes


KINDS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIF")


@settings(max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    length=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=8),
    near_start=st.booleans(),
)
def test_load_bytes_raises_nothing_of_its_own_for_damaged_files(
    kind: str, length: float, flips: list[tuple[float, int]], near_start: bool
) -> None:
    data = bytearray(encode_as(kind))
    for place, bits in flips:
        data[int(place * (min(200, len(data)) if near_start else len(data)))] ^= bits
    check_outcome(bytes(data[: max(0, round(len(data) * (length * 2)))]))


@settings(max_examples=100)
@given(start=st.sampled_from([encode_as(kind)[:12] for kind in KINDS] + [b""]), rest=st.binary())
def test_load_bytes_raises_nothing_of_its_own_for_random_bytes(start: bytes, rest: bytes) -> None:
    check_outcome(start + rest)


def check_outcome(data: bytes) -> None:
    line = ""
    try:
        assert load(data).mode == "RGB"
    except VlmchatError as error:
        line = error.message
    assert line.isprintable()


# --- pictures named in a line of text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("cat.png", "my cat.JPG", "it's.webp", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "sources", "text"),
    [
        pytest.param("cat.png", ["cat.png"], "", id="alone"),
        pytest.param("what is cat.png like", ["cat.png"], "what is like", id="between-words"),
        pytest.param("'my cat.JPG' what's this?", ["my cat.JPG"], "what's this?", id="quoted"),
        pytest.param('compare "my cat.JPG"', ["my cat.JPG"], "compare", id="double-quoted"),
        pytest.param(r"my\ cat.JPG and", ["my cat.JPG"], "and", id="escaped"),
        pytest.param("see my cat.JPG please", ["my cat.JPG"], "see please", id="bare-space"),
        pytest.param(r"'it'\''s.webp'", ["it's.webp"], "", id="quoted-apostrophe"),
        pytest.param("don't 'my cat.JPG'", ["my cat.JPG"], "don't", id="after-apostrophe"),
        pytest.param("cat.png my\\ cat.JPG", ["cat.png", "my cat.JPG"], "", id="several"),
        pytest.param("http://a.b/c.jpg?w=1 eh", ["http://a.b/c.jpg?w=1"], "eh", id="url"),
        pytest.param("data:image/png;base64,AA x", ["data:image/png;base64,AA"], "x", id="data"),
        pytest.param("a\n  b cat.png\nc", ["cat.png"], "a\n  b \nc", id="lines"),
    ],
)
def test_split_image_sources_finds_pictures(
    folder: Path, line: str, sources: list[str], text: str
) -> None:
    assert split_image_sources(line) == (sources, text)


def test_split_image_sources_finds_absolute_paths_and_file_urls(folder: Path) -> None:
    path = folder / "my cat.JPG"
    for name in (path.as_uri(), f"'{path}'", str(path)):
        sources, text = split_image_sources(f"describe {name} now")
        assert len(sources) == 1
        assert text == "describe now"


def test_split_image_sources_takes_a_long_data_url_whole() -> None:
    url = "data:image/png;base64," + "A" * 20_000
    assert split_image_sources(f"look {url} there") == ([url], "look there")


def test_split_image_sources_reads_a_very_long_paste(folder: Path) -> None:
    """It took minutes: every word was tried up to every later suffix."""
    line = "word 'x \"y a.png " * 2000
    assert split_image_sources(line) == ([], line)


@pytest.mark.parametrize(
    "line",
    [
        "what is in dog.png?",
        "see https://example.com/page.html",
        "folder.png notes.txt",
        "  it's 'unclosed  ",
        'say "cat"  \\',
        "'cat.png x'",
        "a\0.png",
        "file://[/cat.png",
        "http://[/cat.png",
        "",
    ],
)
def test_split_image_sources_leaves_all_else_as_it_is(folder: Path, line: str) -> None:
    assert split_image_sources(line) == ([], line)


@given(line=st.text(st.sampled_from("ab '\"\\\n.png:/~"), max_size=60))
@settings(max_examples=300)
def test_split_image_sources_never_loses_words(line: str) -> None:
    assert split_image_sources(line) == ([], line)
