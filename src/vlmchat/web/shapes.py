"""What is done to a picture before a model gets it, and how it is shown on the page.

Called by the page's conversations. The four ways are LLaVA's; knows pixels only.
"""

from __future__ import annotations

from io import BytesIO

from PIL import Image as PILImage
from PIL import ImageOps

from vlmchat.conversation import Image
from vlmchat.images import ImageLoader

MODES = ("Default", "Crop", "Resize", "Pad")
SHOWN_SIDE = 1024  # pixels; a phone's photo need not come back whole
_PAD_COLOR = (122, 116, 104)  # LLaVA's: the mean colour of its pictures
_RESIZED_SIDE = 336  # LLaVA's, from its vision tower


def shaped(image: Image, mode: str, loader: ImageLoader) -> Image:
    """The picture as `mode` has it.

    Default: as it is. Crop: the square in its middle. Resize: squeezed into a square. Pad: filled
    up to a square with grey.
    """
    if mode not in MODES[1:] or image.width == image.height:
        return image
    pixels = image.pixels
    if mode == "Crop":
        pixels = ImageOps.fit(pixels, (min(pixels.size), min(pixels.size)))
    elif mode == "Resize":
        pixels = pixels.resize((_RESIZED_SIDE, _RESIZED_SIDE))
    else:
        side = max(pixels.size)
        square = PILImage.new("RGB", (side, side), _PAD_COLOR)
        square.paste(pixels, ((side - pixels.width) // 2, (side - pixels.height) // 2))
        pixels = square
    file = BytesIO()
    pixels.save(file, "PNG", compress_level=1)
    return loader.load_bytes(file.getvalue(), image.source)


def as_jpeg(image: Image, side: int | None = SHOWN_SIDE) -> bytes:
    """The picture for a page, no side longer than `side`."""
    pixels = image.pixels
    if side is not None and max(pixels.size) > side:
        pixels = ImageOps.contain(pixels, (side, side))
    file = BytesIO()
    pixels.save(file, "JPEG", quality=88)
    return file.getvalue()
