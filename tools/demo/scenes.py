"""Random scenes of flat shapes, and how to draw them.

A scene is described in units that do not depend on the picture's size: positions are fractions of
width and height, radii are fractions of sqrt(width * height).  Nothing in a scene overlaps, and
every shape stands out against the background.
"""

from __future__ import annotations

import colorsys
import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

KINDS = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
ROWS = ("top", "center", "bottom")
COLUMNS = ("left", "center", "right")
REGIONS = (
    "top left",
    "top center",
    "top right",
    "center left",
    "center",
    "center right",
    "bottom left",
    "bottom center",
    "bottom right",
)

SHADES: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 20, 50), (200, 0, 0), (230, 35, 35), (214, 39, 40)),
    "green": ((0, 128, 0), (0, 255, 0), (34, 139, 34), (0, 165, 65), (50, 205, 50), (44, 160, 44)),
    "blue": (
        (0, 0, 255),
        (30, 60, 220),
        (65, 105, 225),
        (20, 120, 240),
        (0, 0, 160),
        (31, 110, 185),
    ),
    "yellow": ((255, 255, 0), (255, 221, 0), (250, 225, 45), (240, 232, 0)),
    "purple": ((128, 0, 128), (148, 0, 211), (160, 32, 240), (138, 43, 226), (145, 60, 180)),
    "orange": ((255, 165, 0), (255, 140, 0), (255, 127, 14), (240, 120, 20), (255, 128, 0)),
    "black": ((0, 0, 0), (15, 15, 15), (28, 28, 32)),
    "white": ((255, 255, 255), (245, 245, 245), (252, 250, 246)),
}
COLORS = tuple(SHADES)

RADII = {"small": (0.055, 0.095), "large": (0.125, 0.19)}
_SPREAD = {
    "circle": (1.0, 1.0),
    "square": (0.85, 1.0),
    "triangle": (1.0, 1.15),
    "star": (1.0, 1.15),
}
_CONTRAST = 95.0
_BORDER = 0.01
_GAP = 0.012


@dataclass(frozen=True)
class Shape:
    """One flat shape: what it is, where it is and the details of its outline."""

    kind: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    rgb: RGB
    angle: float = 0.0
    detail: float = 1.0

    @property
    def region(self) -> str:
        """The ninth of the picture that holds the centre."""
        return REGIONS[3 * min(2, int(self.y * 3)) + min(2, int(self.x * 3))]

    @property
    def order(self) -> tuple[int, float]:
        """Raster order: thirds from top to bottom, then from left to right."""
        return min(2, int(self.y * 3)), self.x


@dataclass(frozen=True)
class Scene:
    """A picture's content; `background` is a small grid of colours that is stretched smoothly."""

    shapes: tuple[Shape, ...]
    aspect: float = 4 / 3
    background: tuple[tuple[RGB, ...], ...] = (((255, 255, 255),),)


def _clip(value: float) -> int:
    return max(0, min(255, round(value)))


def _tint(rng: random.Random, hue: float, saturation: float, value: float) -> RGB:
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return _clip(r * 255), _clip(g * 255), _clip(b * 255)


def random_background(rng: random.Random) -> tuple[tuple[RGB, ...], ...]:
    """White, grey, light, dark, pastel or black; plain, a gradient or soft blobs."""
    styles: tuple[tuple[float, float, float, float, float], ...] = (
        # weight, saturation from, to, value from, to
        (3, 0.00, 0.00, 1.00, 1.00),
        (2, 0.00, 0.06, 0.86, 1.00),
        (2, 0.00, 0.02, 0.30, 0.86),
        (3, 0.08, 0.30, 0.84, 1.00),
        (1, 0.10, 0.35, 0.40, 0.75),
        (2, 0.00, 0.50, 0.06, 0.28),
        (1, 0.00, 0.00, 0.00, 0.00),
    )
    style = rng.choices(styles, [row[0] for row in styles])[0]
    _, s0, s1, v0, v1 = style
    hue, saturation, value = rng.random(), rng.uniform(s0, s1), rng.uniform(v0, v1)
    cells = rng.choices((1, 2, 4, 6), (5, 2, 1, 1))[0]
    if cells == 1:
        return ((_tint(rng, hue, saturation, value),),)
    swing = rng.uniform(0.02, 0.12)
    return tuple(
        tuple(
            _tint(
                rng,
                hue + rng.uniform(-0.05, 0.05),
                min(1.0, max(0.0, saturation + rng.uniform(-swing, swing) / 2)),
                min(1.0, max(0.0, value + rng.uniform(-swing, swing))),
            )
            for _ in range(cells)
        )
        for _ in range(cells)
    )


def random_rgb(rng: random.Random, color: str) -> RGB:
    """A shade that anybody would call `color`: exact, or slightly off."""
    rgb = rng.choice(SHADES[color])
    if rng.random() < 0.35:
        return rgb
    r, g, b = (_clip(channel + rng.uniform(-12, 12)) for channel in rgb)
    return r, g, b


def _stands_out(rgb: RGB, background: tuple[tuple[RGB, ...], ...]) -> bool:
    return all(math.dist(rgb, cell) >= _CONTRAST for row in background for cell in row)


def _random_angle(rng: random.Random, kind: str, turned: bool) -> float:
    if kind == "circle":
        return 0.0
    return rng.uniform(-180, 180) if turned else rng.choice((0.0, 0.0, 0.0, rng.uniform(-8, 8)))


def _near_line(value: float, margin: float) -> bool:
    return min(abs(value - 1 / 3), abs(value - 2 / 3)) < margin


def _place(
    rng: random.Random, radius: float, aspect: float, others: list[Shape], margin: float
) -> tuple[float, float] | None:
    """A free spot for a shape of that radius, every region being as likely as it can be."""
    width, height = math.sqrt(aspect), 1 / math.sqrt(aspect)
    reach_x, reach_y = (radius + _BORDER) / width, (radius + _BORDER) / height
    column, row = rng.randrange(3), rng.randrange(3)
    low_x, high_x = max(column / 3, reach_x), min((column + 1) / 3, 1 - reach_x)
    low_y, high_y = max(row / 3, reach_y), min((row + 1) / 3, 1 - reach_y)
    if low_x >= high_x or low_y >= high_y:
        return None
    x, y = rng.uniform(low_x, high_x), rng.uniform(low_y, high_y)
    if _near_line(x, margin) or _near_line(y, margin):
        return None
    for other in others:
        apart = math.hypot((x - other.x) * width, (y - other.y) * height)
        if apart < radius + other.radius + _GAP:
            return None
    return x, y


def _palette(rng: random.Random, names: tuple[str, ...], most: int) -> tuple[str, ...]:
    """Mostly everything, sometimes few choices, so that scenes hold look-alikes."""
    if rng.random() < 0.55:
        return names
    return tuple(rng.sample(names, rng.randint(1, most)))


def random_scene(
    rng: random.Random, count: int | None = None, margin: float | None = None
) -> Scene:
    """A scene of `count` shapes whose centres keep `margin` away from the lines between thirds."""
    count = rng.randint(1, 6) if count is None else count
    if margin is None:
        margin = 0.03 if rng.random() < 0.85 else 0.0
    while True:
        scene = _try_scene(rng, count, margin)
        if scene is not None:
            return scene


def _try_scene(rng: random.Random, count: int, margin: float) -> Scene | None:
    aspect = 1.0 if rng.random() < 0.2 else math.exp(rng.uniform(-math.log(2), math.log(2)))
    background = random_background(rng)
    shades = {color: random_rgb(rng, color) for color in COLORS}
    visible = tuple(color for color in COLORS if _stands_out(shades[color], background))
    if len(visible) < 4:
        return None
    colors, kinds = _palette(rng, visible, 3), _palette(rng, KINDS, 2)
    turned = rng.random() < 0.25
    share_large = rng.choice((0.2, 0.5, 0.8)) if count < 5 else rng.choice((0.15, 0.4))
    shapes: list[Shape] = []
    for _ in range(count):
        kind, color = rng.choice(kinds), rng.choice(colors)
        for _ in range(40):
            size = SIZES[rng.random() < share_large]
            radius = rng.uniform(*RADII[size]) * rng.uniform(*_SPREAD[kind])
            # A square reaches further than its half side, towards its corners.
            reach = radius * (1.42 if kind == "square" else 1.0)
            spot = _place(rng, reach, aspect, shapes, margin)
            if spot:
                break
        else:
            return None
        rgb = shades[color]
        if rng.random() < 0.3:
            other = random_rgb(rng, color)
            rgb = other if _stands_out(other, background) else rgb
        angle = _random_angle(rng, kind, turned)
        detail = _random_detail(rng, kind)
        shapes.append(Shape(kind, color, size, *spot, reach, rgb, angle, detail))
    return Scene(tuple(sorted(shapes, key=lambda shape: shape.order)), aspect, background)


def _random_detail(rng: random.Random, kind: str) -> float:
    """How slim a triangle is, or how deep the notches of a star are."""
    if kind == "triangle":
        return rng.choice((1.0, rng.uniform(0.8, 1.15)))
    return rng.uniform(0.36, 0.55) if kind == "star" else 1.0


def outline(shape: Shape) -> list[tuple[float, float]]:
    """Corners relative to the centre in units of the radius, y pointing down."""
    if shape.kind == "square":
        corners = [(math.radians(45 + 90 * i), 1.0) for i in range(4)]
    elif shape.kind == "triangle":
        corners = [(math.radians(-90 + 120 * i), 1.0) for i in range(3)]
    else:
        corners = [(math.radians(-90 + 36 * i), (1.0, shape.detail)[i % 2]) for i in range(10)]
    slim = shape.detail if shape.kind == "triangle" else 1.0
    points = [(r * math.cos(a) * slim, r * math.sin(a)) for a, r in corners]
    cos, sin = math.cos(math.radians(shape.angle)), math.sin(math.radians(shape.angle))
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def _paint(
    brush: ImageDraw.ImageDraw, shape: Shape, size: tuple[int, int], unit: float, fill: RGB | int
) -> None:
    """Draw one shape; `unit` is the length of one radius unit along each axis of the canvas."""
    width, height = size
    scale = math.sqrt(width * height)
    stretch = math.sqrt(unit * height / width)
    x, y = shape.x * width, shape.y * height
    rx, ry = shape.radius * scale / stretch, shape.radius * scale * stretch
    if shape.kind == "circle":
        brush.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)
    else:
        brush.polygon([(x + px * rx, y + py * ry) for px, py in outline(shape)], fill=fill)


def size_for(scene: Scene, longest: int) -> tuple[int, int]:
    """Width and height in pixels of the scene when its longer side has `longest` pixels."""
    if scene.aspect >= 1:
        return longest, max(1, round(longest / scene.aspect))
    return max(1, round(longest * scene.aspect)), longest


def draw(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """The clean picture, anti-aliased, at `size` = (width, height)."""
    fine = 4 if max(size) <= 160 else 3 if max(size) <= 320 else 2
    canvas_size = (size[0] * fine, size[1] * fine)
    grid = np.array(scene.background, dtype=np.uint8)
    if grid.shape[0] == 1:
        canvas = Image.new("RGB", canvas_size, scene.background[0][0])
    else:
        canvas = Image.fromarray(grid).resize(canvas_size, Image.Resampling.BICUBIC)
    brush = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        _paint(brush, shape, canvas_size, size[0] / size[1], shape.rgb)
    return canvas.reduce(fine)


def label_map(scene: Scene, side: int) -> np.ndarray:
    """A side x side map: 0 for background, else 1 + the number of the shape."""
    canvas = Image.new("L", (side, side), 0)
    brush = ImageDraw.Draw(canvas)
    for number, shape in enumerate(scene.shapes, start=1):
        _paint(brush, shape, (side, side), scene.aspect, number)
    return np.asarray(canvas)


def degrade(image: Image.Image, rng: random.Random) -> Image.Image:
    """What cameras and web sites do to pictures: slight noise and JPEG compression."""
    if rng.random() < 0.4:
        noise = np.random.default_rng(rng.getrandbits(32))
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels + noise.normal(0, rng.uniform(0.5, 6.0), pixels.shape).astype(np.float32)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(50, 95))
        image = Image.open(buffer).convert("RGB")
    return image


def random_longest(rng: random.Random, most: int = 400) -> int:
    """A side length, small pictures being as likely as large ones."""
    return round(math.exp(rng.uniform(math.log(96), math.log(most))))
