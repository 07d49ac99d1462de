"""Draw the pictures in examples/: python -m tools.demo.draw_examples [DIR]"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.demo.scenes import RADII, RGB, SHADES, Scene, Shape, draw, size_for

FOLDER = Path(__file__).parents[2] / "examples"
Wanted = tuple[str, str, str, float, float]

SNOW: tuple[tuple[RGB, ...], ...] = (
    ((255, 255, 255), (240, 244, 250)),
    ((250, 246, 238), (238, 242, 248)),
)
SAND: tuple[tuple[RGB, ...], ...] = (
    ((253, 244, 226), (247, 232, 208)),
    ((250, 238, 214), (243, 226, 200)),
)
NIGHT: tuple[tuple[RGB, ...], ...] = (((18, 22, 44), (26, 32, 60)), ((34, 40, 70), (22, 26, 50)))
MINT: tuple[tuple[RGB, ...], ...] = (
    ((226, 243, 236), (212, 236, 226)),
    ((232, 246, 240), (218, 238, 230)),
)
PLAIN: tuple[tuple[RGB, ...], ...] = (((246, 246, 246),),)

# File name, longest side, aspect, background, then size, colour, shape and centre of each shape.
EXAMPLES: tuple[tuple[str, int, float, tuple[tuple[RGB, ...], ...], tuple[Wanted, ...]], ...] = (
    (
        "shapes.png",
        640,
        4 / 3,
        SNOW,
        (
            ("large", "red", "circle", 0.20, 0.26),
            ("small", "green", "star", 0.82, 0.20),
            ("large", "blue", "square", 0.52, 0.53),
            ("small", "orange", "triangle", 0.17, 0.80),
        ),
    ),
    (
        "two-circles.png",
        640,
        4 / 3,
        SAND,
        (("large", "purple", "circle", 0.24, 0.50), ("small", "green", "circle", 0.80, 0.80)),
    ),
    ("star.png", 480, 1.0, NIGHT, (("large", "yellow", "star", 0.50, 0.50),)),
    (
        "wide.png",
        960,
        2.0,
        MINT,
        (
            ("small", "red", "square", 0.12, 0.22),
            ("small", "blue", "triangle", 0.50, 0.20),
            ("large", "orange", "star", 0.82, 0.45),
            ("small", "red", "circle", 0.20, 0.80),
            ("small", "black", "square", 0.52, 0.80),
        ),
    ),
    (
        "six-shapes.jpg",
        640,
        4 / 3,
        PLAIN,
        (
            ("small", "yellow", "circle", 0.15, 0.18),
            ("large", "green", "triangle", 0.52, 0.23),
            ("small", "purple", "star", 0.84, 0.20),
            ("small", "blue", "square", 0.18, 0.52),
            ("small", "red", "circle", 0.48, 0.82),
            ("large", "black", "square", 0.82, 0.74),
        ),
    ),
)


def example(
    aspect: float, background: tuple[tuple[RGB, ...], ...], wanted: tuple[Wanted, ...]
) -> Scene:
    """A scene of tidy, upright shapes."""
    shapes = []
    for size, color, kind, x, y in wanted:
        low, high = RADII[size]
        radius = (low + high) / 2 * {"square": 1.25, "triangle": 1.1, "star": 1.1}.get(kind, 1.0)
        detail = 0.42 if kind == "star" else 1.0
        shapes.append(Shape(kind, color, size, x, y, radius, SHADES[color][1], 0.0, detail))
    return Scene(tuple(sorted(shapes, key=lambda shape: shape.order)), aspect, background)


def examples() -> dict[str, tuple[Scene, int]]:
    """Scene and longest side in pixels by file name."""
    return {
        name: (example(aspect, background, wanted), longest)
        for name, longest, aspect, background, wanted in EXAMPLES
    }


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, (scene, longest) in examples().items():
        options = {"quality": 92} if name.endswith(".jpg") else {"optimize": True}
        draw(scene, size_for(scene, longest)).save(folder / name, **options)


if __name__ == "__main__":
    main()
