"""First stage of training: the vision tower learns to say what covers each patch."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tools.demo.model import PATCHES, PatchHeads, normalised, patch_loss
from tools.demo.pool import GRID, Shard, load_shard, mirrored
from tools.demo.scenes import COLORS, KINDS, REGIONS, SIZES, Scene


def patch_targets(scene: Scene, patches: np.ndarray) -> np.ndarray:
    """Per patch: shape (0: none), colour, size, region, and whether it is the shape's middle."""
    rows = np.zeros((7, 5), np.int64)
    for number, shape in enumerate(scene.shapes, start=1):
        rows[number, :4] = (
            KINDS.index(shape.kind) + 1,
            COLORS.index(shape.color),
            SIZES.index(shape.size),
            REGIONS.index(shape.region),
        )
    targets: np.ndarray = rows[patches]
    for shape in scene.shapes:
        middle = min(GRID - 1, int(shape.y * GRID)) * GRID + min(GRID - 1, int(shape.x * GRID))
        targets[middle, 4] = 1
    return targets


@dataclass
class Pictures:
    """A batch of pictures with everything known about them."""

    pixels: Tensor
    targets: Tensor
    scenes: list[Scene]
    covers: list[np.ndarray]


class Album:
    """Random pictures out of the shards that have been drawn so far."""

    def __init__(self, folder: Path, seed: str, keep: int = 6) -> None:
        self.folder, self.rng, self.keep = folder, random.Random(f"album {seed}"), keep
        self.shards: list[Shard] = []
        self.served = 0

    def _refresh(self) -> None:
        """Hold `keep` shards in memory and exchange one of them every now and then."""
        while len(self.shards) < self.keep:
            paths = sorted(self.folder.glob("shard-*.pickle"))
            if not paths:
                time.sleep(1)
                continue
            self.shards.append(load_shard(self.rng.choice(paths)))
        self.shards.pop(0)
        self.shards.append(load_shard(self.rng.choice(sorted(self.folder.glob("shard-*.pickle")))))
        self.served = 0

    def take(self, size: int, most: int = 6) -> Pictures:
        """`size` pictures with at most `most` shapes; half of them mirrored."""
        if not self.shards or self.served > 4000:
            self._refresh()
        self.served += size
        pixels: list[Tensor] = []
        targets: list[Tensor] = []
        scenes: list[Scene] = []
        covers: list[np.ndarray] = []
        while len(scenes) < size:
            shard = self.rng.choice(self.shards)
            i = self.rng.randrange(len(shard.scenes))
            scene, picture, patches = shard.scenes[i], shard.pixels[i], shard.patches[i]
            if len(scene.shapes) > most:
                continue
            target = patch_targets(scene, patches)
            if self.rng.random() < 0.5:
                target, picture = _mirror(target), picture[:, ::-1]
                scene, patches = _mirror_scene(scene, patches)
            pixels.append(torch.from_numpy(picture.copy()))
            targets.append(torch.from_numpy(target))
            scenes.append(scene)
            covers.append(patches)
        return Pictures(torch.stack(pixels), torch.stack(targets), scenes, covers)


def _mirror_scene(scene: Scene, patches: np.ndarray) -> tuple[Scene, np.ndarray]:
    """The mirrored scene, and the shapes' patches by their new numbers."""
    flipped = mirrored(scene)
    places = [(round(1 - shape.x, 9), shape.y) for shape in scene.shapes]
    order = [places.index((round(shape.x, 9), shape.y)) + 1 for shape in flipped.shapes]
    renumbered = np.zeros(7, np.uint8)
    renumbered[order] = range(1, len(order) + 1)
    cells = renumbered[patches].reshape(GRID, GRID)[:, ::-1]
    return flipped, cells.reshape(PATCHES)


def _mirror(targets: np.ndarray) -> np.ndarray:
    flipped = targets.reshape(GRID, GRID, 5)[:, ::-1].reshape(PATCHES, 5).copy()
    flipped[:, 3] = flipped[:, 3] // 3 * 3 + 2 - flipped[:, 3] % 3
    return flipped


def read_outs(logits: tuple[Tensor, ...], targets: Tensor) -> Iterator[float]:
    """The share of patches right for shape, colour, size and region."""
    covered = targets[..., 0] > 0
    yield float((logits[0].argmax(-1) == targets[..., 0])[covered].float().mean())
    for column in (1, 2, 3):
        right = logits[column].argmax(-1) == targets[..., column]
        yield float(right[covered].float().mean())


def train_tower(
    tower: nn.Module,
    heads: PatchHeads,
    album: Album,
    steps: int,
    minutes: float | None,
    size: int = 64,
) -> None:
    """Fit tower and read-outs to the labels of the patches."""
    weights = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        weights, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    fast = torch.compile(tower)
    start = time.time()
    for step in range(steps):
        done = step / steps if minutes is None else (time.time() - start) / (60 * minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1.6e-3 * min(1.0, (step + 1) / 150) * (1.0 - 0.6 * done)
        batch = album.take(size, most=3 if done < 0.2 else 6)
        with torch.autocast("cpu", torch.bfloat16):
            features = fast(normalised(batch.pixels)).last_hidden_state[:, 1:]
        logits = heads(features.float())
        loss = patch_loss(logits, batch.targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 0:
            right = " ".join(f"{share:.3f}" for share in read_outs(logits, batch.targets))
            print(
                f"tower {step} {time.time() - start:.0f}s loss {loss:.3f} right {right}", flush=True
            )
