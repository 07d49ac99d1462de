"""Pixels and token counts of original checkpoints: the original's, bit for bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.original import GRIDS, TILE, write_tower
from tests.pictures import noise_image
from vlmchat.engine.llava_config import Pictures
from vlmchat.engine.llava_pixels import PixelMaker, best_resolution, count_tokens
from vlmchat.errors import CheckpointError

TINY = Pictures(
    aspect_ratio="anyres",
    resolutions=tuple((width, height) for width, height in GRIDS),
    merge="spatial_unpad",
    layer=-2,
    keep_class=False,
    tile=TILE,
    side=2,
    projector="linear",
    width=32,
)
LARGE = replace(
    TINY,
    resolutions=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    tile=336,
    side=24,
)
# Digests of what LLaVA's preprocessing gives under Pillow 12.0, whose bytes are the original's.
GOLDEN: dict[str, str] = json.loads(
    Path(__file__).with_name("golden_pixels.json").read_text("utf-8")
)
SIZES = [(40, 40), (90, 31), (31, 90), (500, 334), (20, 20), (300, 7), (7, 300), (29, 57)]
# Source: the original's own code, run.
TOKENS = {
    (640, 480): 2340,
    (480, 640): 2352,
    (336, 336): 1176,
    (672, 672): 2928,
    (3000, 3000): 2928,
    (1920, 1080): 1948,
    (1024, 899): 2634,
    (1008, 336): 2328,
    (336, 1008): 2376,
    (500, 334): 1464,
    (1000, 100): 1160,
    (300, 200): 976,
    (1408, 792): 1850,
}


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pixels") / "tower"
    write_tower(directory)
    return directory


@pytest.mark.parametrize("ratio", ["pad", "square", "anyres"])
@pytest.mark.parametrize(("seed", "size"), list(enumerate(SIZES)))
def test_pixels_equal_the_originals_bit_for_bit(
    tower: Path, seed: int, size: tuple[int, int], ratio: str
) -> None:
    pixels = PixelMaker(tower, replace(TINY, aspect_ratio=ratio))(noise_image(seed, *size).pixels)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    assert digest.startswith(GOLDEN[f"{ratio} {size[0]}x{size[1]}"])


@pytest.mark.parametrize("size", TOKENS)
def test_anyres_counts_tokens_as_the_original(size: tuple[int, int]) -> None:
    assert count_tokens(size, LARGE) == TOKENS[size]


def test_small_pictures_take_the_first_of_two_grids_that_fit_alike() -> None:
    """transformers reads the list as (height, width) and takes the other one."""
    assert best_resolution((300, 200), LARGE.resolutions) == (336, 672)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        pytest.param((10, 1000), 576 + 72, id="no-columns-are-left-but-line-ends"),
        pytest.param((1000, 10), 576, id="no-rows-are-left"),
    ],
)
def test_unpadding_may_leave_nothing_of_a_thin_picture(size: tuple[int, int], tokens: int) -> None:
    assert count_tokens(size, LARGE) == tokens


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        pytest.param({"aspect_ratio": "pad"}, 576, id="pad"),
        pytest.param({"aspect_ratio": "square"}, 576, id="crop"),
        pytest.param({"aspect_ratio": "pad", "keep_class": True}, 577, id="class-token"),
        pytest.param({"merge": "flat"}, 5 * 576, id="flat"),
        pytest.param({"merge": "spatial"}, 5 * 576, id="spatial"),
    ],
)
def test_other_settings_have_their_own_counts(changes: dict[str, str], tokens: int) -> None:
    assert count_tokens((640, 480), replace(LARGE, **changes)) == tokens  # type: ignore[arg-type]


def test_tower_whose_preprocessor_makes_another_size_is_refused(tower: Path) -> None:
    with pytest.raises(CheckpointError, match="28"):
        PixelMaker(tower, LARGE)


def test_tower_without_a_preprocessor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        PixelMaker(tmp_path, TINY)
