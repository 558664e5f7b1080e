"""The figures of cache formats: bits of storage against KL or recall, the formats that no other beats in both joined by a line.

Colours are fixed on a background of their own, one for light and one for dark surroundings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 900, 540
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 56, 62
LETTER, LINE = 7.2, 15
"""Pixels: of a letter, on average at most, and from line to line."""
_LONGEST = 36
"""Letters of a name."""
_ROOM = 1.08
"""Beyond the smallest and the largest format."""
_TICKS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 10, 12, 16, 24, 32)
STYLE = """
.back { fill: #ffffff } .ink { fill: #24292f } .soft { fill: #57606a } .grid { stroke: #d8dee4; stroke-width: 1 }
.ours { fill: #0969da } .front { fill: none; stroke: #0969da; stroke-width: 2 } .halo { stroke: #ffffff; stroke-width: 1.5 }
.peer { fill: #bc4c00 } .leader { stroke: #8c959f; stroke-width: 0.8 } text { font: 12px system-ui, sans-serif } .title { font-size: 15px }
.best { font-weight: 600 }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117 } .ink { fill: #e6edf3 } .soft { fill: #9198a1 } .grid { stroke: #2b3138 } .ours { fill: #4493f8 }
.front { stroke: #4493f8 } .halo { stroke: #0d1117 } .peer { fill: #f0883e } .leader { stroke: #656c76 } }
"""


@dataclass(frozen=True)
class Measure:
    """What is drawn upwards: the name in a row, words for the axis and above the figure, and whether more of it is better.

    Less is better on a logarithmic axis, more on an even one from 0 to 1.
    """

    key: str
    axis: str
    title: str
    more: bool = False


KL = Measure("kl", "KL of the next token, nats", "Cache formats: bits of storage against distance from the float model")
RECALL = Measure("recall", "facts recalled", "Cache formats: bits of storage against recall over 1,800 tokens", more=True)


@dataclass(frozen=True)
class Point:
    """A format: its name, bits per number, what was measured, and whether it is ours."""

    name: str
    bits: float
    value: float
    ours: bool


@dataclass(frozen=True)
class Box:
    """A rectangle, for what must not overlap."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


class Axes:
    """Bits to the right, KL upwards, both as logarithms: a bit matters more where there are few."""

    def __init__(self, points: Sequence[Point], measure: Measure) -> None:
        """Ranges that hold all points."""
        self.measure = measure
        self.first, self.last = min(p.bits for p in points) / _ROOM, max(p.bits for p in points) * _ROOM
        heights = [self._height(p.value) for p in points]
        self.low, self.high = math.floor(min(heights) * 3 - 0.3) / 3, math.ceil(max(heights) * 3 + 0.3) / 3
        if measure.more:
            self.low, self.high = 0.0, 1.0

    def _height(self, value: float) -> float:
        return value if self.measure.more else math.log10(value)

    def x(self, bits: float) -> float:
        """Pixels from the left."""
        return LEFT + math.log(bits / self.first) / math.log(self.last / self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return TOP + (self.high - self._height(value)) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Values to the left of the figure."""
        if self.measure.more:
            yield from ((step / 10, f"{10 * step} %") for step in range(11))
            return
        for exponent in range(math.floor(self.low), math.ceil(self.high) + 1):
            values = (digit * 10.0**exponent for digit in (1, 2, 5))
            yield from ((value, f"{value:g}") for value in values if self.low <= math.log10(value) <= self.high)


def pareto(points: Iterable[Point], measure: Measure) -> list[Point]:
    """Those that no other beats in bits and in what is measured at once, from the smallest up."""
    sign = -1 if measure.more else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, sign * p.value)):
        if not front or sign * point.value < sign * front[-1].value:
            front.append(point)
    return front


def draw(rows: Iterable[Mapping[str, Any]], measure: Measure) -> str:
    """The figure as SVG, of rows as the benchmarks write them; those that failed are left out.

    Raises:
        ValueError: without a row that was measured.
    """
    points = [
        Point(_name(row), row["bits"], row[measure.key], row["by"] == "qcompile")
        for row in rows
        if measure.key in row and (measure.more or row[measure.key] > 0)
    ]
    if not points:
        raise ValueError(f"figure: expected at least one row with bits and {measure.key}, got none; measure formats first")
    axes, front = Axes(points, measure), pareto(points, measure)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text class="ink title" x="{LEFT}" y="26">{measure.title}</text>',
        *_grid(axes),
        *_legend(),
        _front(axes, front),
        *_labels(axes, points, front),
        *(_mark(axes, point) for point in points),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _name(row: Mapping[str, Any]) -> str:
    name = str(row["cache"]) if row["by"] == "qcompile" else f"{row['by']} {row['cache']}"
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _grid(axes: Axes) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for bits in (bits for bits in _TICKS if axes.first <= bits <= axes.last):
        x = axes.x(bits)
        yield f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>'
        yield f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{bits:g}</text>'
    for value, words in axes.ticks():
        y = axes.y(value)
        yield f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        yield f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{words}</text>'
    middle, half_way = (LEFT + right) / 2, (TOP + bottom) / 2
    below = "bits per number of a sequence of 4096 tokens, everything counted"
    yield f'<text class="ink" x="{middle}" y="{HEIGHT - 16}" text-anchor="middle">{below}</text>'
    turned = f"translate(18 {half_way}) rotate(-90)"
    yield f'<text class="ink" transform="{turned}" text-anchor="middle">{axes.measure.axis}</text>'


def _legend() -> Iterator[str]:
    x, y = WIDTH - RIGHT, 44
    words = (
        ("ours", "● "),
        ("soft", "qcompile   "),
        ("peer", "◆ "),
        ("soft", "other libraries   "),
        ("ours", "— "),
        ("soft", "nothing beats both"),
    )
    spans = "".join(f'<tspan class="{kind}">{text}</tspan>' for kind, text in words)
    yield f'<text x="{x}" y="{y}" text-anchor="end" xml:space="preserve">{spans}</text>'


def _front(axes: Axes, front: Sequence[Point]) -> str:
    """From format to format as a staircase: between two only the smaller one is to be had."""
    path = f"M{axes.x(front[0].bits):.1f} {axes.y(front[0].value):.1f}"
    path += "".join(f"H{axes.x(point.bits):.1f}V{axes.y(point.value):.1f}" for point in front[1:])
    return f'<path class="front" d="{path}"/>'


def _stairs(axes: Axes, front: Sequence[Point]) -> Iterator[Box]:
    """What the staircase covers, wide enough that no name touches it."""
    for before, after in pairwise(front):
        left, top, right, bottom = axes.x(before.bits), axes.y(before.value), axes.x(after.bits), axes.y(after.value)
        yield Box(left, top - 3, right, top + 3)
        yield Box(right - 3, top, right + 3, bottom)


def _mark(axes: Axes, point: Point) -> str:
    x, y = axes.x(point.bits), axes.y(point.value)
    if point.ours:
        return f'<circle class="ours halo" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
    return f'<path class="peer halo" d="M{x:.1f} {y - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5z"/>'


def _labels(axes: Axes, points: Sequence[Point], front: Sequence[Point]) -> Iterator[str]:
    """Names beside their points, each where it covers least of what is there already."""
    taken = [Box(axes.x(p.bits) - 7, axes.y(p.value) - 7, axes.x(p.bits) + 7, axes.y(p.value) + 7) for p in points]
    taken += _stairs(axes, front)
    for point in sorted(points, key=lambda p: (p not in front, p.bits)):
        x, y = axes.x(point.bits), axes.y(point.value)
        box, leads = _place(x, y, LETTER * len(point.name), taken)
        taken.append(box)
        if leads:
            end, height = min(max(x, box.left), box.right), (box.top + box.bottom) / 2
            yield f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{height:.1f}"/>'
        kind = "ink best" if point in front else "soft"
        anchor, at = ("end", box.right) if box.right < x else ("start", box.left)
        yield f'<text class="{kind}" x="{at:.1f}" y="{box.bottom - 4:.1f}" text-anchor="{anchor}">{escape(point.name)}</text>'


def _place(x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[Box, bool]:
    """A box for a name near a point, and whether it is so far off that a line must lead there."""
    inside = Box(LEFT, TOP, WIDTH - 4, HEIGHT - BOTTOM)
    best, least = (Box(x, y, x, y), False), math.inf
    for distance in range(7):
        for left in (x + 10, x - 10 - width, x - width / 2):
            for middle in (y - LINE * distance, y + LINE * distance):
                box = Box(left, middle - LINE / 2, left + width, middle + LINE / 2)
                outside = width * LINE - box.overlap(inside)
                cost = 3 * outside + sum(box.overlap(other) for other in taken) + 6 * distance
                if cost < least - 1e-9:
                    best, least = (box, distance > 1), cost
    return best
