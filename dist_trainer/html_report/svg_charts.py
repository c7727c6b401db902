"""Line charts as SVG text, for a page that needs nothing but itself.

What is drawn here is seen where scripts are not allowed; elsewhere script.js draws the same anew from the data beside it, as
wide as the window is, over the axis that the reader chose.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dist_trainer.tracking.formatting import short

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 22, 36
MOST_POINTS = 600
"""Points of a line: beyond two a pixel nobody sees more."""
POINTS_OF_ALL = 4000
"""Points of the lines of a chart together, so that a page of many runs stays small."""
BEGINNING = 0.1
"""Share of the steps whose losses, far above all later ones, a clipped axis need not reach."""
CLIPPED_QUANTILE = 0.99
"""Share of the later values that a clipped axis reaches for certain."""
MOST_SKIPS = 200


@dataclass(frozen=True)
class Line:
    """One line of a chart; points that are not finite are gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    """CSS classes: a colour (c0 to c7), a dash (d0 to d3), and faint or dots."""
    run: int = 0
    """Number of the run it is of."""
    key: str | None = None
    """What the legend calls it; None: as its label, "": it is not in the legend."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at step `x` of run `run`, by its number in the list that the page has of them."""

    x: float
    number: int
    run: int
    words: str


@dataclass(frozen=True)
class Chart:
    """What one figure shows."""

    title: str
    unit: str
    lines: list[Line]
    marks: list[Mark] = field(default_factory=list)
    skips: list[tuple[float, int]] = field(default_factory=list)
    """(step, run) of updates that were skipped."""
    from_zero: bool = False
    clips: bool = False
    """Whether the axis may leave out rare spikes, and the beginning unless `shows_beginning`."""
    shows_beginning: bool = False
    explains_marks: bool = False
    """Whether its legend says what the marks are."""


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
        """Pixels from the top; what lies beyond the axis lies just outside."""
        place = HEIGHT - BOTTOM - (value - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)
        return max(place, -HEIGHT)


def figure(chart: Chart) -> str:
    """The chart as an HTML figure; empty where no line has a point. Its data stand beside it for the page's script."""
    most = min(MOST_POINTS, POINTS_OF_ALL // max(1, len(chart.lines)))
    thinned = ((line, *thin(line.x, line.y, most)) for line in chart.lines)
    lines = [replace(line, x=x, y=y) for line, x, y in thinned if x]
    if not lines:
        return ""
    low_x, high_x = _span([x for line in lines for x in line.x], room=1.0)
    low_y, top = _span([y for line in lines for y in line.y])
    low_y = min(0.0, low_y) if chart.from_zero else low_y
    high_y = clipped_top(lines, low_y, top, shows_beginning=chart.shows_beginning) if chart.clips else top
    scale = Scale(low_x, high_x, low_y, high_y)
    skips = chart.skips[:: math.ceil(len(chart.skips) / MOST_SKIPS) or 1]
    title, unit = html.escape(chart.title), html.escape(chart.unit)
    name = chart.title.lower().replace(" ", "-")
    parts = [
        f'<figure class="chart" id="{name}">',
        f"<figcaption><b>{title}</b> <small>{unit}</small>{_legend(chart, lines)}</figcaption>",
        f'<div class="plot" tabindex="0" role="slider" aria-label="{title} by step; arrow keys read values" '
        f'aria-valuemin="{low_x:g}" aria-valuemax="{high_x:g}" aria-valuenow="{high_x:g}" aria-valuetext="{_ends(lines)}">',
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true"><clipPath id="{name}-inside">',
        f'<rect x="0" y="{TOP - 4}" width="{WIDTH}" height="{HEIGHT - TOP - BOTTOM + 8}"/></clipPath>',
        *_grid(scale),
        *(_mark(scale, mark) for mark in chart.marks if low_x <= mark.x <= high_x),
        f'<g clip-path="url(#{name}-inside)">',
        *(_path(scale, line) for line in lines),
        "</g>",
        *(f'<text class="skip" x="{scale.x(x):.1f}" y="{HEIGHT - BOTTOM - 3}" text-anchor="middle">×</text>' for x, _ in skips),
        '</svg></div><output aria-live="off"></output>',
        _clip_note(top, high_y),
        f'<script type="application/json">{_data(chart.marks, skips, scale, lines, top)}</script></figure>',
    ]
    return "".join(parts)


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: of each stretch its lowest and its highest, so that no spike is lost."""
    if not math.isfinite(sum(x) + sum(y)):
        finite = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
        x, y = [a for a, _ in finite], [b for _, b in finite]
    if len(x) <= most:
        return list(x), list(y)
    stretch = math.ceil(len(x) / (most // 2))
    kept = {0, len(x) - 1}
    for start in range(0, len(x), stretch):
        part = y[start : start + stretch]
        kept |= {start + part.index(min(part)), start + part.index(max(part))}
    places = sorted(kept)
    return [x[place] for place in places], [y[place] for place in places]


def clipped_top(lines: Sequence[Line], low: float, top: float, *, shows_beginning: bool = False) -> float:
    """Where the axis ends: at `top`, or lower where that leaves out only rare spikes, and the beginning unless
    `shows_beginning`, and gives the rest a third more room at least.
    """
    first, last = _span([x for line in lines for x in line.x])
    start = first + BEGINNING * (last - first)
    later = sorted(y for line in lines for x, y in zip(line.x, line.y, strict=True) if x >= start)
    if not later:
        return top
    reached = later[min(len(later) - 1, math.ceil(CLIPPED_QUANTILE * len(later)))]
    reached += 0.04 * (reached - low)
    if shows_beginning:
        reached = max([reached, *(y for line in lines for x, y in zip(line.x, line.y, strict=True) if x < start)])
    return reached if low < reached and 4 / 3 * (reached - low) < top - low else top


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _span(values: list[float], *, room: float | None = None) -> tuple[float, float]:
    """From the lowest to the highest; where they are one, with some room around it."""
    low, high = min(values), max(values)
    if high > low:
        return low, high
    room = room or abs(low) * 0.05 or 1.0
    return low - room, high + room


def _ends(lines: Sequence[Line]) -> str:
    ends = (f"{line.label} {short(line.y[0])} at first, {short(line.y[-1])} at step {line.x[-1]:.0f}" for line in lines)
    return html.escape("; ".join(ends))


def _clip_note(top: float, high: float) -> str:
    if high == top:
        return ""
    return f'<p class="note clipnote">The axis ends at {short(high)}; higher values, up to {short(top)}, are cut off.</p>'


def _grid(scale: Scale) -> Iterator[str]:
    for value in ticks(scale.low_y, scale.high_y, 6):
        y = scale.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
    for value in filter(float.is_integer, ticks(scale.low_x, scale.high_x)):
        yield f'<text x="{scale.x(value):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{short(value)}</text>'


def _path(scale: Scale, line: Line) -> str:
    places = [(scale.x(x), scale.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places if "dots" in line.style or len(places) == 1)
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<g class="{line.style}"><path d="{d}"/>{dots}</g>'


def _mark(scale: Scale, mark: Mark) -> str:
    place = scale.x(mark.x)
    return (
        f'<g class="mark"><line x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{place:.1f}" y="{TOP - 6}" text-anchor="middle">{mark.number}</text></g>'
    )


def _legend(chart: Chart, lines: list[Line]) -> str:
    named = [(line.label if line.key is None else line.key, line.style) for line in lines if line.key != ""]
    keys = [key(label, style) for label, style in named] if len(lines) > 1 else []
    if any(line.key == "" and "dots" in line.style for line in lines):
        keys.append(key("dots: validation", "dots lone"))
    if chart.marks and chart.explains_marks:
        keys.append('<span class="key"><i class="swatch markswatch"></i>restart or stop, numbered below</span>')
    if chart.skips:
        keys.append('<span class="key"><i class="skipswatch">×</i>update skipped: not finite</span>')
    return f'<span class="keys">{"".join(keys)}</span>' if keys else ""


def key(label: str, style: str) -> str:
    """A line's entry in a legend: a piece of it, and what it is."""
    dot = '<circle cx="13" cy="5" r="3"/>' if "dots" in style else ""
    piece = f'<svg class="swatch {style}" viewBox="0 0 26 10" aria-hidden="true"><path d="M1 5H25"/>{dot}</svg>'
    return f'<span class="key">{piece}{html.escape(label)}</span>'


def _data(marks: list[Mark], skips: list[tuple[float, int]], scale: Scale, lines: list[Line], top: float) -> str:
    data = {
        "low": scale.low_y,
        "high": scale.high_y,
        "top": top,
        "lines": [
            {
                "label": line.label,
                "style": line.style,
                "run": line.run,
                "x": [int(x) if x == int(x) else x for x in line.x],
                "y": [float(f"{y:.5g}") for y in line.y],
            }
            for line in lines
        ],
        "marks": [[mark.x, mark.run, mark.number, mark.words] for mark in marks],
        "skips": skips,
    }
    return as_script_data(data)


def as_script_data(data: object) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
