"""Line charts as SVG text, for a page that needs nothing but itself."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 34
MOST_POINTS = 600
"""Points of a line: beyond two a pixel nobody sees more."""


@dataclass(frozen=True)
class Line:
    """One line of a chart; points that are not finite are gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    """CSS classes: a colour (c0 to c5), and thin, faint or dots."""


@dataclass(frozen=True)
class Chart:
    """What one figure shows."""

    title: str
    unit: str
    lines: list[Line]
    marks: list[tuple[float, str]] = field(default_factory=list)
    """(x, what happened there): restarts, signals."""
    from_zero: bool = False


def figure(chart: Chart) -> str:
    """The chart as an HTML figure; empty where no line has a point. Its data stand beside it for the page's script."""
    lines = [Line(line.label, *thin(line.x, line.y), line.style) for line in chart.lines]
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    low_x, high_x = _span([x for line in lines for x in line.x])
    low_y, high_y = _span([y for line in lines for y in line.y])
    low_y = min(0.0, low_y) if chart.from_zero else low_y
    scale = Scale(low_x, high_x, low_y, high_y)
    title, unit = html.escape(chart.title), html.escape(chart.unit)
    parts = [
        f'<figure class="chart" tabindex="0" aria-label="{title}; arrow keys read values">',
        f"<figcaption>{title} <small>{unit}</small>{_legend(lines)}</figcaption>",
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
        *_grid(scale),
        *(_mark(scale, x, what) for x, what in chart.marks if low_x <= x <= high_x),
        *(_path(scale, line) for line in lines),
        '<line class="cursor" y1="14" y2="266" x1="-9" x2="-9"/></svg><output></output>',
        f'<script type="application/json">{_data(scale, lines)}</script></figure>',
    ]
    return "".join(parts)


@dataclass(frozen=True)
class Scale:
    """From values to places in the picture."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return HEIGHT - BOTTOM - (value - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points: of each stretch its lowest and its highest, so that no spike is lost."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(points) > MOST_POINTS:
        stretch = math.ceil(len(points) / (MOST_POINTS // 2))
        kept: list[tuple[float, float]] = []
        for start in range(0, len(points), stretch):
            part = points[start : start + stretch]
            kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
        points = [points[0], *(point for point in kept if point not in (points[0], points[-1])), points[-1]]
    return [a for a, _ in points], [b for _, b in points]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """`1.5k`, `0.0003`, `2M`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _span(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    room = abs(low) * 0.05 or 1.0
    return low - room, high + room


def _grid(scale: Scale) -> Iterator[str]:
    for value in ticks(scale.low_y, scale.high_y):
        y = scale.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
    for value in ticks(scale.low_x, scale.high_x):
        yield f'<text x="{scale.x(value):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{short(value)}</text>'


def _path(scale: Scale, line: Line) -> str:
    places = [(scale.x(x), scale.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places if "dots" in line.style or len(places) == 1)
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<g class="{line.style}"><path d="{d}"/>{dots}</g>'


def _mark(scale: Scale, x: float, what: str) -> str:
    place = scale.x(x)
    return (
        f'<g class="mark"><line x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f"<title>{html.escape(what)}</title></g>"
    )


def _legend(lines: list[Line]) -> str:
    if len(lines) == 1:
        return ""
    return "".join(f'<span class="key {line.style}">{html.escape(line.label)}</span>' for line in lines)


def _data(scale: Scale, lines: list[Line]) -> str:
    series = [
        {"label": line.label, "x": [float(f"{x:.8g}") for x in line.x], "y": [float(f"{y:.6g}") for y in line.y]}
        for line in lines
    ]
    data = {"low": scale.low_x, "high": scale.high_x, "left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH, "series": series}
    return json.dumps(data).replace("<", "\\u003c")
