"""A picture's pixels as LLaVA's own code prepares them, bit for bit; and how many tokens it takes.

Used by the processor of original checkpoints. No torch: Pillow and numpy.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling
from transformers.image_transforms import center_crop

from vlmchat.engine.hub import read_json
from vlmchat.engine.llava_config import Pictures, Size
from vlmchat.errors import CheckpointError

Pixels = NDArray[np.float32]


class PixelMaker:
    """Pictures to what the vision tower takes, by the tower's own preprocessor_config.json."""

    def __init__(self, tower: Path, pictures: Pictures) -> None:
        """Raises CheckpointError where the tower's files do not fit each other."""
        file = tower / "preprocessor_config.json"
        settings = read_json(file)
        try:
            self._mean = np.array(settings["image_mean"], np.float32)
            self._std = np.array(settings["image_std"], np.float32)
            self._colour = tuple(int(part * 255) for part in settings["image_mean"])
            self._short_side = _side(settings["size"], "shortest_edge")
            self._crop = _side(settings["crop_size"], "height")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is missing or lacks {error}") from error
        self._scale = settings.get("rescale_factor", 1 / 255)
        self._resample = Resampling(settings.get("resample", Resampling.BICUBIC))
        self._pictures = pictures
        if self._crop != pictures.tile:
            raise CheckpointError(
                f"{file} makes pictures of {self._crop} pixels, its tower takes {pictures.tile}"
            )

    def __call__(self, picture: Image.Image) -> Pixels:
        """[tiles, 3, tile, tile]: one, or for anyres the whole picture and then its tiles."""
        ratio = self._pictures.aspect_ratio
        if ratio == "pad":
            return self._normal(_square(picture, self._colour))[None]
        if ratio == "anyres":
            canvas = self._canvas(picture)
            whole = resize(picture, (self._short_side, self._short_side))
            return np.stack([self._normal(tile) for tile in (whole, *self._tiles(canvas))])
        return self._normal(picture)[None]

    def _canvas(self, picture: Image.Image) -> Image.Image:
        """The picture as large as it fits, in the middle of a black canvas."""
        width, height = best_resolution(picture.size, self._pictures.resolutions)
        wide, high = width / picture.width, height / picture.height
        if wide < high:
            size = width, min(math.ceil(picture.height * wide), height)
        else:
            size = min(math.ceil(picture.width * high), width), height
        canvas = Image.new("RGB", (width, height), (0, 0, 0))
        canvas.paste(resize(picture, size), ((width - size[0]) // 2, (height - size[1]) // 2))
        return canvas

    def _tiles(self, canvas: Image.Image) -> list[Image.Image]:
        """Row by row."""
        side = self._crop
        xs, ys = range(0, canvas.width, side), range(0, canvas.height, side)
        return [canvas.crop((x, y, x + side, y + side)) for y in ys for x in xs]

    def _normal(self, picture: Image.Image) -> Pixels:
        """[3, tile, tile]: resized by the short side, cropped in the middle, normalised."""
        short, long = sorted(picture.size)
        long = int(self._short_side * long / short)
        portrait = picture.width <= picture.height
        size = (self._short_side, long) if portrait else (long, self._short_side)
        pixels: Any = np.asarray(resize(picture, size, self._resample))  # [H, W, 3]
        pixels = center_crop(pixels, (self._crop, self._crop), input_data_format="channels_last")
        pixels = (pixels * self._scale).astype(np.float32)
        pixels = (pixels - self._mean) / self._std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resize(
    picture: Image.Image, size: Size, resample: Resampling = Resampling.BICUBIC
) -> Image.Image:
    """Width first, then height: the order of Pillow before version 13, which chooses its own."""
    return picture.resize((size[0], picture.height), resample).resize(size, resample)


def best_resolution(size: Size, resolutions: tuple[Size, ...]) -> Size:
    """The canvas on which most of a picture's pixels survive; then the one least left empty."""

    def fitness(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        scaled = int(size[0] * scale) * int(size[1] * scale)
        kept = min(scaled, size[0] * size[1])
        return kept, kept - canvas[0] * canvas[1]

    return max(resolutions, key=fitness)  # the first of those equally fit


def grid_shape(size: Size, pictures: Pictures) -> Size:
    """Columns and rows of tiles that anyres cuts a picture of that size into."""
    width, height = best_resolution(size, pictures.resolutions)
    return width // pictures.tile, height // pictures.tile


def unpadded(size: Size, columns: int, rows: int) -> tuple[slice, slice]:
    """Of a canvas of columns x rows patches, the rows and the columns that hold the picture.

    Source: LLaVA's own arithmetic, which may leave nothing of a very thin picture.
    """
    width, height = size
    if width / height > columns / rows:
        pad = (rows - int(height * (columns / width))) // 2
        return slice(pad, rows - pad), slice(0, columns)
    pad = (columns - int(width * (rows / height))) // 2
    return slice(0, rows), slice(pad, columns - pad)


def count_tokens(size: Size, pictures: Pictures) -> int:
    """Features of one picture of that size, in pixels."""
    side = pictures.side
    base = side * side + pictures.keep_class
    if pictures.aspect_ratio != "anyres":
        return base
    columns, rows = grid_shape(size, pictures)
    if pictures.merge != "spatial_unpad":
        return base + base * columns * rows
    kept = unpadded(size, columns * side, rows * side)
    high, wide = (len(range(part.start, part.stop)) for part in kept)
    return base + high * (wide + 1)


def _square(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _side(size: Any, key: str) -> int:
    return int(size[key] if isinstance(size, dict) else size)
