"""A pool of pictures drawn ahead of training, kept in shards on disk.

Drawing costs milliseconds a picture, which a training step cannot afford.  `python -m
tools.demo.pool DIR` fills a folder; training draws what is missing in background processes and
uses the shards that are ready.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tools.demo.scenes import (
    Scene,
    degrade,
    draw,
    label_map,
    random_longest,
    random_scene,
    size_for,
)

SIDE = 96
PATCH = 8
GRID = SIDE // PATCH
SHARD = 4000


@dataclass
class Shard:
    """Pictures at the model's resolution, what they show, and which shape covers each patch."""

    pixels: np.ndarray
    patches: np.ndarray
    scenes: list[Scene]


def patch_labels(scene: Scene) -> np.ndarray:
    """For every patch 0, or 1 + the number of the shape that covers most of it."""
    blocks = label_map(scene, SIDE).reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3)
    cells = blocks.reshape(GRID * GRID, PATCH * PATCH)
    counts = np.stack([(cells == n).sum(1) for n in range(1, len(scene.shapes) + 1)])
    best = counts.argmax(0)
    return np.where(counts.max(0) >= 6, best + 1, 0).astype(np.uint8)


def model_pixels(image: Image.Image) -> np.ndarray:
    """The picture as the image processor resizes it."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def make_shard(seed: int, size: int = SHARD) -> Shard:
    """Draw `size` pictures; mostly 96 to 400 pixels wide, a few larger or smaller."""
    rng = random.Random(f"pool {seed}")
    pixels = np.empty((size, SIDE, SIDE, 3), np.uint8)
    patches = np.empty((size, GRID * GRID), np.uint8)
    scenes = []
    for i in range(size):
        scene = random_scene(rng)
        longest = rng.choices(
            (random_longest(rng), rng.randint(64, 128), rng.randint(400, 1400)), (90, 7, 3)
        )[0]
        pixels[i] = model_pixels(degrade(draw(scene, size_for(scene, longest)), rng))
        patches[i] = patch_labels(scene)
        scenes.append(scene)
    return Shard(pixels, patches, scenes)


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` is kept."""
    return folder / f"shard-{number:03d}.pickle"


def _draw_shards(folder: Path, seed: int, numbers: list[int]) -> None:
    os.nice(5)
    for number in numbers:
        path = shard_path(folder, number)
        if not path.exists():
            shard = make_shard(seed * 1000 + number)
            scratch = path.with_suffix(".tmp")
            parts = (shard.pixels, shard.patches, shard.scenes)
            scratch.write_bytes(pickle.dumps(parts, protocol=5))
            scratch.rename(path)


def start_pool(folder: Path, seed: int, shards: int, workers: int) -> list[multiprocessing.Process]:
    """Draw shards 0 to `shards` - 1 in background processes."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    jobs = []
    for worker in range(workers):
        numbers = list(range(worker, shards, workers))
        job = context.Process(target=_draw_shards, args=(folder, seed, numbers), daemon=True)
        job.start()  # type: ignore[no-untyped-call, unused-ignore]
        jobs.append(job)
    return jobs  # type: ignore[return-value]


def load_shard(path: Path) -> Shard:
    """Read a shard that this program wrote."""
    pixels, patches, scenes = pickle.loads(path.read_bytes())
    return Shard(pixels, patches, scenes)


def mirrored(scene: Scene) -> Scene:
    """The scene as a mirror shows it."""
    shapes = (replace(shape, x=1 - shape.x, angle=-shape.angle) for shape in scene.shapes)
    ordered = tuple(sorted(shapes, key=lambda shape: shape.order))
    return Scene(ordered, scene.aspect, tuple(row[::-1] for row in scene.background))


def main() -> None:
    """Fill a pool folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    for job in start_pool(args.folder, args.seed, args.shards, args.workers):
        job.join()


if __name__ == "__main__":
    main()
