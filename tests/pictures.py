"""Pictures for tests: made in memory, the same for the same seed."""

from __future__ import annotations

import hashlib

import numpy as np
import PIL.Image

from vlmchat.conversation import Image


def noise_image(seed: int, width: int = 40, height: int = 30) -> Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return Image(PIL.Image.fromarray(pixels), pixels.tobytes(), f"noise-{seed}", digest, digest)
