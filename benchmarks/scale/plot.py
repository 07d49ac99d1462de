"""Rows of the simulation as an SVG: what is cached, how long the first token takes, over workers.

Called by the command. Written by hand: a plot of three panels is no reason for a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

Row = dict[str, Any]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 250, 200, 44, 34, 40, 62
COLOURS = {"lottery": "#888888", "shortest_queue": "#d1731b", "cache_aware": "#1f6fb4"}
_MOST_WORKERS = 1000


@dataclass(frozen=True, slots=True)
class Panel:
    """value(row) over workers. ticks: in order; the scale is a log one unless they begin at 0."""

    title: str
    value: Callable[[Row], float]
    ticks: Sequence[float]

    def height(self, value: float) -> float:
        """Where a value stands, in pixels from the top."""
        low, high = self.ticks[0], self.ticks[-1]
        value = min(max(value, low), high)
        if low > 0:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return TOP + HEIGHT * (1 - (value - low) / (high - low))


def svg(rows: Sequence[Row], panels: Sequence[Panel]) -> str:
    """A line for each profile, policy and seed; of the first profile, further seeds are dotted."""
    width = LEFT + len(panels) * (WIDTH + GAP)
    keys = sorted({(row["profile"], row["policy"], row["seed"]) for row in rows})
    profiles, seeds = sorted({key[0] for key in keys}), sorted({key[2] for key in keys})
    height = TOP + HEIGHT + BOTTOM + 18 * (1 + len(COLOURS))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for n, panel in enumerate(panels):
        left = LEFT + n * (WIDTH + GAP)
        parts += _frame(panel, left)
        for key in keys:
            own = [row for row in rows if (row["profile"], row["policy"], row["seed"]) == key]
            points = sorted((row["workers"], panel.value(row)) for row in own)
            dash = "6 3" if key[0] != profiles[0] else "2 2" if key[2] != seeds[0] else ""
            parts += _line(panel, left, points, COLOURS[key[1]], dash)
    top = TOP + HEIGHT + BOTTOM
    for n, (policy, colour) in enumerate(COLOURS.items()):
        parts.append(_text(LEFT, top + 18 * n, policy, f'fill="{colour}" font-weight="bold"'))
    told = f"solid: {profiles[0]}, seed {seeds[0]}"
    told += f"; dotted: seed {seeds[1]}" if seeds[1:] else ""
    told += f"; dashed: {profiles[1]}" if profiles[1:] else ""
    parts.append(_text(LEFT + 130, top, told))
    return "\n".join([*parts, "</svg>\n"])


def _across(workers: float) -> float:
    return WIDTH * math.log(workers) / math.log(_MOST_WORKERS)


def _frame(panel: Panel, left: int) -> Iterable[str]:
    yield _text(left, TOP - 14, panel.title, 'font-weight="bold"')
    for tick in panel.ticks:
        y = panel.height(tick)
        yield f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#ddd"/>'
        yield _text(left - 4, y + 4, f"{tick:g}", 'text-anchor="end"')
    for workers in (1, 10, 100, 1000):
        x = left + _across(workers)
        yield _text(x, TOP + HEIGHT + 16, f"{workers}", 'text-anchor="middle"')
    yield _text(left + WIDTH / 2, TOP + HEIGHT + 30, "workers", 'text-anchor="middle"')


def _line(
    panel: Panel, left: int, points: Sequence[tuple[float, float]], colour: str, dash: str
) -> Iterable[str]:
    places = [(left + _across(x), panel.height(y)) for x, y in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-dasharray="{dash}"/>'
    for x, y in places:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'
