"""What the report draws of runs: which charts there are, smoothed losses, restarts and skipped updates."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, repeat
from typing import Any

from dist_trainer.errors import counted
from dist_trainer.html_report.svg_charts import Chart, Line, Mark
from dist_trainer.tracking.formatting import duration
from dist_trainer.tracking.goodput import END_EVENTS, START_EVENTS
from dist_trainer.tracking.run_reader import RunHistory

COLOURS, DASHES = 8, 4
MOST_RUNS = COLOURS
"""Runs of one page: beyond, no eye tells their lines apart."""
RUNS_WITH_RAW_LOSS = 3
"""Where more lie over one another, only their smoothed losses are drawn."""
POINTS_TO_EACH_SIDE = 50
"""The smoothed loss looks as far to each side as this part of all points."""
POINTS_OF_AN_AXIS = 200
MOST_MARKS = 200

SMOOTHING_IN_WORDS = (
    "The smoothed value at point i is the mean of all points j, weighted by exp(−|i − j| · 50 / n) where n is the number of "
    "points. It looks a fiftieth of the run to each side, so it neither lags behind nor hides a short run."
)


def charts(runs: Sequence[RunHistory], labels: Sequence[str]) -> Iterator[Chart]:
    """The charts of `runs`, the loss first; those without a point are to be left out."""
    marks = [mark for _, mark in numbered_marks(runs)]
    losses = [line for number, run in enumerate(runs) for line in _loss_lines(run, labels[number], number, len(runs))]
    skips = [(step, number) for number, run in enumerate(runs) for step in skipped_steps(run)]
    (time_unit, time_factor), (wait_unit, wait_factor) = (unit_of_time(runs, of) for of in ("step_seconds", "data_seconds"))
    yield Chart("Loss", "nats per token", losses, marks, skips, clips=True, shows_beginning=True, explains_marks=True)
    for title, unit, column, factor, is_noisy in (
        ("Learning rate", "", "lr", 1.0, False),
        ("Gradient norm", "before clipping", "grad_norm", 1.0, True),
        ("Throughput", "tokens a second", "tokens_per_second", 1.0, True),
        ("MFU", "% of the devices' peak", "mfu", 100.0, True),
        ("Peak memory", "GiB, rank 0", "peak_memory_bytes", 2.0**-30, False),
        ("Time of a step", f"{time_unit}, waiting for data included", "step_seconds", time_factor, True),
        ("Waiting for data", f"{wait_unit} a step", "data_seconds", wait_factor, True),
    ):
        lines: list[Line] = []
        for number, run in enumerate(runs):
            values = [value * factor for value in run.train[column]]
            label = labels[number] if len(runs) > 1 else title.lower()
            lines += _lines(run.train["step"], values, label, number, len(runs), is_noisy=is_noisy)
        told = f"{unit}, smoothed" if is_noisy and len(runs) > 1 else unit
        yield Chart(title, told, lines, marks, from_zero=True, clips=is_noisy)


def unit_of_time(runs: Sequence[RunHistory], column: str) -> tuple[str, float]:
    """Seconds if any value reaches one, else milliseconds; and how many there are in a second."""
    reaches_one = any(value >= 1 for run in runs for value in run.train[column])
    return ("s", 1.0) if reaches_one else ("ms", 1000.0)


def style_of(number: int) -> str:
    """The classes of run `number`'s lines: no two have both colour and dash in common."""
    return f"c{number} d{(number + number // DASHES) % DASHES}"


def _loss_lines(run: RunHistory, label: str, number: int, num_runs: int) -> Iterator[Line]:
    steps, losses, style = run.train["step"], run.train["loss"], style_of(number)
    validated, found = run.validation["step"], run.validation["loss"]
    if num_runs == 1:
        yield Line("training", steps, losses, f"{style} faint")
        yield Line("smoothed", steps, smoothed(losses), style)
        yield Line("validation", validated, found, "c1 d0 dots")
        return
    if num_runs <= RUNS_WITH_RAW_LOSS:
        yield Line(f"{label}: training", steps, losses, f"c{number} d0 faint", number, key="")
    yield Line(f"{label}: smoothed", steps, smoothed(losses), style, number, key=label)
    yield Line(f"{label}: validation", validated, found, f"{style} dots lone", number, key="")


def _lines(
    steps: Sequence[float], values: list[float], label: str, number: int, num_runs: int, *, is_noisy: bool
) -> Iterator[Line]:
    """Of one column: as it is, and smoothed where it is noisy; only that where several runs lie over one another."""
    style = style_of(number)
    if not is_noisy:
        yield Line(label, steps, values, style, number)
    elif num_runs > 1:
        yield Line(label, steps, smoothed(values), style, number)
    else:
        yield Line("measured", steps, values, f"{style} faint", key="")
        yield Line("smoothed", steps, smoothed(values), style, key="")


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean of all finite values j around i, weighted by exp(-|i - j| * 50 / n): from both sides, so it does not lag.

    Two exponential means, one running forward and one back, share the value itself.
    """
    known = [value for value in values if math.isfinite(value)]
    keep = math.exp(-POINTS_TO_EACH_SIDE / max(1, len(known)))

    def running(total: float, value: float) -> float:
        return keep * total + value

    forward, weights = accumulate(known, running), list(accumulate(repeat(1.0, len(known)), running))
    back = reversed(list(accumulate(reversed(known), running)))
    means = (
        (before + after - value) / (weight_before + weight_after - 1)
        for before, after, value, weight_before, weight_after in zip(
            forward, back, known, weights, reversed(weights), strict=True
        )
    )
    return [next(means) if math.isfinite(value) else math.nan for value in values]


def skipped_steps(run: RunHistory) -> list[float]:
    """Logged steps whose update was skipped, or whose loss is not finite."""
    broken = (step for step, loss in zip(run.train["step"], run.train["loss"], strict=True) if not math.isfinite(loss))
    return sorted({float(step) for step in run.skipped} | set(broken))


# ---------------------------------------------------------------------------------------------- what happened


def numbered_marks(runs: Sequence[RunHistory]) -> Iterator[tuple[int, Mark]]:
    """(run's number, mark) of each restart and each end by a signal or an error, numbered from 1 through all runs."""
    found = [(number, step, words) for number, run in enumerate(runs) for step, words in timeline(run.events)]
    for count, (number, step, words) in enumerate(found[:MOST_MARKS], start=1):
        yield number, Mark(float(step), count, number, words)


def timeline(events: Sequence[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """(step, what happened there), of one run: a restart is told together with the end before it."""
    end: dict[str, Any] | None = None
    has_begun = False
    for event in events:
        if event["event"] in END_EVENTS:
            end = event
        elif event["event"] in START_EVENTS:
            if has_begun:
                yield event["step"], _restart_in_words(end, event)
            elif event["step"]:
                yield event["step"], f"began at step {event['step']} of another run"
            end, has_begun = None, True
    if end is not None and end["event"] != "finished":
        yield end["step"], _end_in_words(end)


def _end_in_words(end: dict[str, Any] | None) -> str:
    if end is None:
        return "ended without a word (killed)"
    reason = str(end.get("reason") or "")
    if end["event"] == "preempted":
        return f"stopped by {reason or 'a signal'} at step {end['step']}, saved"
    if end["event"] == "finished":
        return f"finished its {counted(end['step'], 'step')}"
    if f"step {end['step']}:" in reason:
        return f"failed, {reason}"
    return f"failed at step {end['step']}{': ' if reason else ''}{reason}"


def _restart_in_words(end: dict[str, Any] | None, start: dict[str, Any]) -> str:
    began = start.get("began")
    wait = began - end["time"] if end is not None and isinstance(began, int | float) else math.nan
    later = f" {duration(wait)} later" if wait >= 0 else ""
    lost = start.get("lost_steps")
    again = f", {counted(lost, 'step')} done again" if isinstance(lost, int) and lost > 0 else ""
    return f"{_end_in_words(end)}; started again{later}, from step {start['step']}{again}"


# -------------------------------------------------------------------------------------------- horizontal axes


def axes_of(run: RunHistory) -> dict[str, list[float]]:
    """Steps, with the tokens done and the hours passed since the run began: what a chart may be drawn over instead."""
    steps, tokens, times = run.train["step"], run.train["tokens"], run.train["time"]
    known = [i for i in range(len(steps)) if math.isfinite(tokens[i]) and math.isfinite(times[i])]
    if not known:
        return {"step": [], "tokens": [], "hours": []}
    starts = [event for event in run.events if event["event"] in START_EVENTS]
    # Time jumps at a restart: the line before and the one after it must not be among those left out.
    restarts = (bisect_right(known, start["step"], key=steps.__getitem__) for start in starts)
    beside = {place for after in restarts for place in (after - 1, after) if 0 <= place < len(known)}
    places = sorted({*range(0, len(known), math.ceil(len(known) / POINTS_OF_AN_AXIS)), len(known) - 1} | beside)
    kept = [known[place] for place in places]
    begins = (start.get("began") for start in starts)
    began = next((t for t in begins if isinstance(t, int | float) and t <= times[known[0]]), times[known[0]])
    return {
        "step": [steps[i] for i in kept],
        "tokens": [tokens[i] for i in kept],
        "hours": [float(f"{(times[i] - began) / 3600:.6g}") for i in kept],
    }
