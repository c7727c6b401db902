"""The report's charts: their lines and marks, and the data that script.js draws.

Smoothing, thinning and the range of each y-axis are computed here; script.js draws the SVG at the width of the window.
"""

from __future__ import annotations

import html
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, repeat

from dist_trainer.html_report.timeline import Mark, numbered_marks
from dist_trainer.tracking.goodput import START_EVENTS
from dist_trainer.tracking.run_reader import RunHistory

COLOURS, DASHES = 8, 4
MAX_RUNS = COLOURS
"""Runs on one page: with more, their lines cannot be distinguished."""
MAX_RUNS_WITH_RAW_LOSS = 3
"""With more runs on a page, only their smoothed losses are drawn."""
POINTS_TO_EACH_SIDE = 50
"""The smoothing window reaches 1/50 of all points to each side."""
POINTS_OF_AN_AXIS = 200
MAX_SKIPS = 200
MAX_POINTS = 600
"""Maximum number of points of a line: more than two per pixel are not visible."""
MAX_POINTS_OF_A_CHART = 4000
"""Maximum number of points of all lines of a chart, so that a page of many runs stays small."""
BEGINNING = 0.1
"""Fraction of the steps whose values, far above all later ones, a clipped axis need not reach."""
HUGE = 1e300
"""Values from here on are left out like infinite ones: sums of them overflow, and JSON has no infinity."""
CLIPPED_QUANTILE = 0.99
"""Fraction of the later values that a clipped axis always reaches."""

SMOOTHING = (
    "The smoothed value at point i is the mean of all points j, weighted by exp(−|i − j| · 50 / n), where n is the number of "
    "points. The window reaches a fiftieth of the run to each side, so the curve does not lag and short runs keep their shape."
)


@dataclass(frozen=True)
class Line:
    """One line of a chart; points that are not finite are gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    """CSS classes: a colour (c0 to c7), a dash (d0 to d3), and faint or dots."""
    run: int = 0
    """Number of the run it belongs to."""
    key: str | None = None
    """Its name in the legend; None: the label, "": not in the legend."""


@dataclass(frozen=True)
class Chart:
    """What one figure shows."""

    title: str
    unit: str
    lines: list[Line]
    marks: list[Mark] = field(default_factory=list)
    skips: list[tuple[float, int]] = field(default_factory=list)
    """(step, run) of skipped updates."""
    from_zero: bool = False
    clips: bool = False
    """Whether the axis may leave out rare spikes, and the beginning unless `shows_beginning`."""
    shows_beginning: bool = False
    explains_marks: bool = False
    """Whether its legend explains the marks."""


def charts(runs: Sequence[RunHistory], labels: Sequence[str]) -> Iterator[Chart]:
    """The charts of `runs`, the loss first; some may have no points."""
    marks = numbered_marks(runs)
    losses = [line for number, run in enumerate(runs) for line in _loss_lines(run, labels[number], number, len(runs))]
    skips = [(step, number) for number, run in enumerate(runs) for step in skipped_steps(run)]
    (time_unit, time_factor), (wait_unit, wait_factor) = (unit_of_time(runs, of) for of in ("step_seconds", "data_seconds"))
    yield Chart("Loss", "nats per token", losses, marks, skips, clips=True, shows_beginning=True, explains_marks=True)
    for title, unit, column, factor, is_noisy in (
        ("Learning rate", "", "lr", 1.0, False),
        ("Gradient norm", "before clipping", "grad_norm", 1.0, True),
        ("Throughput", "tokens per second", "tokens_per_second", 1.0, True),
        ("MFU", "% of the devices' peak", "mfu", 100.0, True),
        ("Peak memory", "GiB, rank 0", "peak_memory_bytes", 2.0**-30, False),
        ("Step time", f"{time_unit}, including waiting for data", "step_seconds", time_factor, True),
        ("Waiting for data", f"{wait_unit} per step", "data_seconds", wait_factor, True),
    ):
        lines: list[Line] = []
        for number, run in enumerate(runs):
            steps, values, style = run.train["step"], [value * factor for value in run.train[column]], style_of(number)
            label = labels[number] if len(runs) > 1 else title.lower()
            if not is_noisy:
                lines.append(Line(label, steps, values, style, number))
            elif len(runs) > 1:
                lines.append(Line(label, steps, smoothed(values), style, number))
            else:
                lines.append(Line("measured", steps, values, f"{style} faint", key=""))
                lines.append(Line("smoothed", steps, smoothed(values), style, key=""))
        shown_unit = f"{unit}, smoothed" if is_noisy and len(runs) > 1 else unit
        yield Chart(title, shown_unit, lines, marks, from_zero=True, clips=is_noisy)


def unit_of_time(runs: Sequence[RunHistory], column: str) -> tuple[str, float]:
    """Seconds if any value is at least one, else milliseconds; and how many of them are in a second."""
    reaches_one = any(value >= 1 for run in runs for value in run.train[column])
    return ("s", 1.0) if reaches_one else ("ms", 1000.0)


def style_of(number: int) -> str:
    """CSS classes for the lines of run `number`: no two runs have both colour and dash in common."""
    return f"c{number} d{(number + number // DASHES) % DASHES}"


def _loss_lines(run: RunHistory, label: str, number: int, num_runs: int) -> Iterator[Line]:
    steps, losses, style = run.train["step"], run.train["loss"], style_of(number)
    validated, validation_losses = run.validation["step"], run.validation["loss"]
    if num_runs == 1:
        yield Line("training", steps, losses, f"{style} faint")
        yield Line("smoothed", steps, smoothed(losses), style)
        yield Line("validation", validated, validation_losses, "c1 d0 dots")
        return
    if num_runs <= MAX_RUNS_WITH_RAW_LOSS:
        yield Line(f"{label}: training", steps, losses, f"c{number} d0 faint", number, key="")
    yield Line(f"{label}: smoothed", steps, smoothed(losses), style, number, key=label)
    yield Line(f"{label}: validation", validated, validation_losses, f"{style} dots lone", number, key="")


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean of all finite values j around i, weighted by exp(-|i - j| * 50 / n): from both sides, so it does not lag.

    The sum of two exponential means, one running forward and one back, which share the value itself.
    """
    finite = [value for value in values if math.isfinite(value)]
    decay = math.exp(-POINTS_TO_EACH_SIDE / max(1, len(finite)))

    def running(total: float, value: float) -> float:
        return decay * total + value

    forward, weights = accumulate(finite, running), list(accumulate(repeat(1.0, len(finite)), running))
    back = reversed(list(accumulate(reversed(finite), running)))
    means = (
        (before + after - value) / (weight_before + weight_after - 1)
        for before, after, value, weight_before, weight_after in zip(
            forward, back, finite, weights, reversed(weights), strict=True
        )
    )
    return [next(means) if math.isfinite(value) else math.nan for value in values]


def skipped_steps(run: RunHistory) -> list[float]:
    """Logged steps whose update was skipped, or whose loss is not finite."""
    broken = (step for step, loss in zip(run.train["step"], run.train["loss"], strict=True) if not math.isfinite(loss))
    return sorted({float(step) for step in run.skipped} | set(broken))


# --------------------------------------------------------------------------------------------------- axes


def axes_of(run: RunHistory) -> dict[str, list[float]]:
    """Some steps with their tokens and hours since the run began, from which script.js interpolates the other x-axes."""
    steps, tokens, times = run.train["step"], run.train["tokens"], run.train["time"]
    known = [i for i in range(len(steps)) if math.isfinite(tokens[i]) and math.isfinite(times[i])]
    if not known:
        return {"step": [], "tokens": [], "hours": []}
    starts = [event for event in run.events if event["event"] in START_EVENTS]
    # Time jumps at a restart: keep the lines before and after it.
    restarts = (bisect_right(known, start["step"], key=steps.__getitem__) for start in starts)
    around = {place for after in restarts for place in (after - 1, after) if 0 <= place < len(known)}
    places = sorted({*range(0, len(known), math.ceil(len(known) / POINTS_OF_AN_AXIS)), len(known) - 1} | around)
    kept = [known[place] for place in places]
    begins = (start.get("began") for start in starts)
    began = next((t for t in begins if isinstance(t, int | float) and t <= times[known[0]]), times[known[0]])
    return {
        "step": [steps[i] for i in kept],
        "tokens": [tokens[i] for i in kept],
        "hours": [float(f"{(times[i] - began) / 3600:.6g}") for i in kept],
    }


def clipped_top(lines: Sequence[Line], low: float, top: float, *, shows_beginning: bool = False) -> float:
    """The end of the y-axis: `top`, or lower if that cuts off only rare spikes (and the beginning, unless `shows_beginning`)
    and leaves at least a third more room to the rest.
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
    highest = max(y for line in lines for y in line.y)
    return reached if low < reached < highest and 4 / 3 * (reached - low) < top - low else top


def _span(values: list[float]) -> tuple[float, float]:
    """From the lowest to the highest; with some room around it if they are equal, or differ by rounding only."""
    low, high = min(values), max(values)
    room = 0.0 if high - low > 1e-12 * abs(high) else abs(low) * 0.05 or 1.0
    return low - room, high + room


def thin(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """The points below HUGE, at most `limit` of them: the lowest and the highest of each stretch, so that no spike is lost."""
    if y and not (math.isfinite(sum(x) + sum(y)) and min(y) > -HUGE and max(y) < HUGE):
        finite = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and abs(b) < HUGE]
        x, y = [a for a, _ in finite], [b for _, b in finite]
    if len(x) <= limit:
        return list(x), list(y)
    stretch = math.ceil(len(x) / (limit // 2))
    kept = {0, len(x) - 1}
    for start in range(0, len(x), stretch):
        part = y[start : start + stretch]
        kept |= {start + part.index(min(part)), start + part.index(max(part))}
    places = sorted(kept)
    return [x[place] for place in places], [y[place] for place in places]


# ------------------------------------------------------------------------------------------------ as HTML


def figure(chart: Chart) -> str:
    """The chart's caption, legend and data, for script.js to draw; empty if no line has a point."""
    limit = min(MAX_POINTS, MAX_POINTS_OF_A_CHART // max(1, len(chart.lines)))
    thinned = ((line, *thin(line.x, line.y, limit)) for line in chart.lines)
    lines = [replace(line, x=x, y=y) for line, x, y in thinned if x]
    if not lines:
        return ""
    low, top = _span([y for line in lines for y in line.y])
    low = min(0.0, low) if chart.from_zero else low
    data = {
        "low": low,
        "high": clipped_top(lines, low, top, shows_beginning=chart.shows_beginning) if chart.clips else top,
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
        "marks": [[mark.x, mark.run, mark.number, mark.text] for mark in chart.marks],
        "skips": chart.skips[:: math.ceil(len(chart.skips) / MAX_SKIPS) or 1],
    }
    title = html.escape(chart.title)
    return (
        f'<figure class="chart" id="{chart.title.lower().replace(" ", "-")}">'
        f"<figcaption><b>{title}</b> <small>{html.escape(chart.unit)}</small>{_legend(chart, lines)}</figcaption>"
        f'<div class="plot" tabindex="0" role="slider" aria-label="{title}; arrow keys read values"></div>'
        f'<output aria-live="off"></output><p class="note clipnote" hidden></p>'
        f'<script type="application/json">{script_data(data)}</script></figure>'
    )


def _legend(chart: Chart, lines: list[Line]) -> str:
    named = [(line.label if line.key is None else line.key, line.style) for line in lines if line.key != ""]
    keys = [legend_key(label, style) for label, style in named] if len(lines) > 1 else []
    if any(line.key == "" and "dots" in line.style for line in lines):
        keys.append(legend_key("dots: validation", "dots lone"))
    if chart.marks and chart.explains_marks:
        keys.append('<span class="key"><i class="swatch markswatch"></i>stop or restart (see list)</span>')
    if chart.skips:
        keys.append('<span class="key"><i class="skipswatch">×</i>update skipped (NaN/Inf)</span>')
    return f'<span class="keys">{"".join(keys)}</span>' if keys else ""


def legend_key(label: str, style: str) -> str:
    """A line's entry in a legend: a piece of the line, and its name."""
    dot = '<circle cx="13" cy="5" r="3"/>' if "dots" in style else ""
    piece = f'<svg class="swatch {style}" viewBox="0 0 26 10" aria-hidden="true"><path d="M1 5H25"/>{dot}</svg>'
    return f'<span class="key">{piece}{html.escape(label)}</span>'


def script_data(data: object) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
