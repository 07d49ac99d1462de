"""Scenes are reproducible, keep their promises, and end up where the drawing says."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tools.demo.draw_examples import EXAMPLES, FOLDER, examples
from tools.demo.pool import patch_labels
from tools.demo.scenes import (
    KINDS,
    REGIONS,
    Scene,
    Shape,
    degrade,
    draw,
    label_map,
    random_scene,
    size_for,
)
from tools.demo.tower import patch_targets


def test_same_seed_draws_the_same_picture() -> None:
    pictures = []
    for _ in range(2):
        rng = random.Random(7)
        scene = random_scene(rng)
        pictures.append(np.asarray(degrade(draw(scene, size_for(scene, 200)), rng)))
    assert (pictures[0] == pictures[1]).all()


@pytest.mark.parametrize("seed", range(40))
def test_random_scenes_do_not_overlap_and_stay_inside(seed: int) -> None:
    scene = random_scene(random.Random(seed))
    width, height = math.sqrt(scene.aspect), 1 / math.sqrt(scene.aspect)
    assert 1 <= len(scene.shapes) <= 6
    for number, shape in enumerate(scene.shapes):
        assert shape.radius <= shape.x * width <= width - shape.radius
        assert shape.radius <= shape.y * height <= height - shape.radius
        for other in scene.shapes[:number]:
            apart = math.hypot((shape.x - other.x) * width, (shape.y - other.y) * height)
            assert apart > shape.radius + other.radius


@pytest.mark.parametrize("kind", KINDS)
def test_shape_is_drawn_in_its_colour_at_its_place(kind: str) -> None:
    shape = Shape(kind, "red", "large", 0.75, 0.25, 0.15, (255, 0, 0))
    pixels = np.asarray(draw(Scene((shape,), 2.0), (400, 200)))
    assert tuple(pixels[50, 300]) == (255, 0, 0)
    assert tuple(pixels[150, 100]) == (255, 255, 255)
    covered = label_map(Scene((shape,), 2.0), 96) == 1
    rows, columns = np.nonzero(covered)
    assert abs(columns.mean() / 96 - 0.75) < 0.02
    assert abs(rows.mean() / 96 - 0.25) < 0.04


def test_regions_are_thirds_in_reading_order() -> None:
    centres = [(x / 6, y / 6) for y in (1, 3, 5) for x in (1, 3, 5)]
    shapes = [Shape("circle", "red", "small", x, y, 0.07, (255, 0, 0)) for x, y in centres]
    assert tuple(shape.region for shape in shapes) == REGIONS


def test_patches_know_the_shape_that_covers_them() -> None:
    scene = examples()["star.png"][0]
    patches = patch_labels(scene)
    targets = patch_targets(scene, patches)
    assert patches[6 * 12 + 6] == 1
    assert patches[0] == 0
    assert targets[:, 4].sum() == 1
    assert targets[6 * 12 + 6].tolist() == [4, 3, 1, 4, 1]


def test_examples_are_the_drawn_ones() -> None:
    assert {path.name for path in FOLDER.iterdir()} >= {example[0] for example in EXAMPLES}
