"""The stops and restarts of runs, as sentences with the step where each happened: marks in the charts, and a list below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dist_trainer.errors import counted
from dist_trainer.tracking.formatting import duration
from dist_trainer.tracking.goodput import END_EVENTS, START_EVENTS
from dist_trainer.tracking.run_reader import RunHistory

MAX_MARKS = 200


@dataclass(frozen=True)
class Mark:
    """A stop or restart at step `x` of run `run`, with its number in the page's list."""

    x: float
    number: int
    run: int
    text: str


def numbered_marks(runs: Sequence[RunHistory]) -> list[Mark]:
    """A mark for each restart and each end by a signal or an error, numbered from 1 through all runs."""
    entries = [(run, step, text) for run, history in enumerate(runs) for step, text in timeline(history.events)]
    return [Mark(float(step), count, run, text) for count, (run, step, text) in enumerate(entries[:MAX_MARKS], start=1)]


def timeline(events: Sequence[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """(step, what happened there) of one run; a restart includes the end before it."""
    end: dict[str, Any] | None = None
    has_begun = False
    for event in events:
        if event["event"] in END_EVENTS:
            end = event
        elif event["event"] in START_EVENTS:
            if has_begun:
                yield event["step"], _format_restart(end, event)
            elif event["step"]:
                yield event["step"], f"started from step {event['step']} of another run"
            end, has_begun = None, True
    if end is not None and end["event"] != "finished":
        yield end["step"], _format_end(end)


def _format_end(end: dict[str, Any] | None) -> str:
    if end is None:
        return "killed without a message"
    reason = str(end.get("reason") or "")
    if end["event"] == "preempted":
        return f"stopped by {reason or 'a signal'} at step {end['step']}, saved"
    if end["event"] == "finished":
        return f"finished {counted(end['step'], 'step')}"
    if f"step {end['step']}:" in reason:
        return f"failed, {reason}"
    return f"failed at step {end['step']}{': ' if reason else ''}{reason}"


def _format_restart(end: dict[str, Any] | None, start: dict[str, Any]) -> str:
    began = start.get("began")
    wait = began - end["time"] if end is not None and isinstance(began, int | float) else math.nan
    later = f" {duration(wait)} later" if wait >= 0 else ""
    lost = start.get("lost_steps")
    repeated = f", {counted(lost, 'step')} repeated" if isinstance(lost, int) and lost > 0 else ""
    return f"{_format_end(end)}; restarted{later} from step {start['step']}{repeated}"
