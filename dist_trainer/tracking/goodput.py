"""How a run's time was spent, over all its attempts: steps, validation, and everything else.

An attempt is one execution of the command, from its start to its end; each stop or crash is followed by another one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any

from dist_trainer.tracking.run_reader import RunHistory, last_logged_step, number, read_events, read_progress

START_EVENTS = ("start", "resume")
END_EVENTS = ("finished", "preempted", "failed")


@dataclass(frozen=True)
class Goodput:
    """Seconds since the run first started, including downtime between restarts."""

    wall_seconds: float = 0.0
    step_seconds: float = 0.0
    """In the steps of metrics.jsonl (those lost and repeated count once), excluding `data_seconds`."""
    data_seconds: float = 0.0
    """Waiting for data in these steps."""
    validation_seconds: float = 0.0
    sample_seconds: float = 0.0
    saving_seconds: float = 0.0
    """Training was paused for checkpoints."""
    starting_seconds: float = 0.0
    """From the start of a command to its first step: imports, data, loading, compilation."""
    redone_seconds: float = 0.0
    """In steps lost to restarts; estimated from their number and the mean time of a step."""
    downtime_seconds: float = 0.0
    """Between the end of an attempt and the start of the next one."""
    restarts: int = 0
    """Starts in this folder after the first one (which may have started from another run's checkpoint)."""
    lost_steps: int = 0
    """Steps that had to be repeated, since they came after the checkpoint that was resumed from."""

    @property
    def useful_seconds(self) -> float:
        """In steps and validation."""
        return self.step_seconds + self.data_seconds + self.validation_seconds

    @property
    def other_seconds(self) -> float:
        """Everything else: the last save, the end, trackers."""
        named = self.sample_seconds + self.saving_seconds + self.starting_seconds + self.redone_seconds + self.downtime_seconds
        return max(0.0, self.wall_seconds - self.useful_seconds - named)

    @property
    def share(self) -> float:
        """Useful over total; from 0 to 1."""
        return self.useful_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0


def goodput(run: RunHistory, *, now: float | None = None) -> Goodput:
    """The goodput of `run` until `now` (unix seconds; None: until its last line)."""
    times = sorted(t for t in _times(run) if math.isfinite(t))
    starts = _starts(run.events)
    if not starts:
        return Goodput()
    steps = data = counted = 0.0
    before = starts[0]["step"]  # steps up to there belong to another run
    for step, seconds, waited in zip(run.train["step"], run.train["step_seconds"], run.train["data_seconds"], strict=True):
        waited = waited if math.isfinite(waited) else 0.0
        if math.isfinite(seconds):
            steps += (step - before) * (seconds - waited)
            data += (step - before) * waited
            counted += step - before
        before = step
    restarts, lost_steps = _restarts(starts)
    redone, downtime = _between_attempts(run, starts, times, mean_step_seconds=(steps + data) / counted if counted else 0.0)
    return Goodput(
        wall_seconds=(times[-1] if now is None else now) - _began(starts[0]),
        step_seconds=steps,
        data_seconds=data,
        validation_seconds=_total(run.validation["seconds"]),
        sample_seconds=_total(sample.seconds for sample in run.samples),
        saving_seconds=_total(run.train["checkpoint_stall_ms"]) / 1000,
        starting_seconds=_starting(run, starts),
        redone_seconds=redone,
        downtime_seconds=downtime,
        restarts=restarts,
        lost_steps=lost_steps,
    )


def restarts_of(folder: Path) -> tuple[int, int]:
    """How often the run in `folder` was restarted, and how many steps that lost."""
    return _restarts(_starts(read_events(folder)))


def steps_to_redo(folder: Path, *, start_step: int) -> int:
    """Steps past `start_step` that the run in `folder` has already done and will repeat."""
    return max(0, last_logged_step(folder) - start_step, read_progress(folder) - start_step)


def _times(run: RunHistory) -> Iterable[float]:
    return chain(run.train["time"], run.validation["time"], (event["time"] for event in run.events))


def _began(start: dict[str, Any]) -> float:
    """When the attempt of `start` started: before imports and tokenising, if the event says so."""
    began = number(start.get("began"))
    return began if math.isfinite(began) else start["time"]


def _starting(run: RunHistory, starts: list[dict[str, Any]]) -> float:
    """Seconds before the first step of each attempt: until its start event, then until its first line, minus its steps."""
    train, seconds = run.train, 0.0
    for start, following in zip_longest(starts, starts[1:]):
        seconds += max(0.0, start["time"] - _began(start))
        until = math.inf if following is None else _began(following)
        first = bisect_left(train["time"], start["time"])
        if first < len(train["time"]) and train["time"][first] < until:
            stepping = (train["step"][first] - start["step"]) * train["step_seconds"][first]
            warming_up = train["time"][first] - start["time"] - stepping
            seconds += max(0.0, warming_up) if math.isfinite(warming_up) else 0.0
    return seconds


def _between_attempts(
    run: RunHistory, starts: list[dict[str, Any]], times: list[float], *, mean_step_seconds: float
) -> tuple[float, float]:
    """Seconds in lost steps, and between attempts. An attempt without an end event is taken to end after its lost steps."""
    redone = downtime = 0.0
    for before, start in pairwise(starts):
        began = _began(start)
        ended = [e["time"] for e in run.events if e["event"] in END_EVENTS and before["time"] <= e["time"] <= began]
        last = times[max(0, bisect_right(times, began) - 1)]
        lost = start.get("lost_steps")
        estimate = lost * mean_step_seconds if isinstance(lost, int) else 0.0
        end = max(ended) if ended and max(ended) >= last else min(began, last + estimate)
        redone += estimate
        downtime += max(0.0, began - end)
    return redone, downtime


def _total(seconds: Iterable[float]) -> float:
    return sum(value for value in seconds if math.isfinite(value))


def _starts(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] in START_EVENTS and math.isfinite(event["time"])]


def _restarts(starts: list[dict[str, Any]]) -> tuple[int, int]:
    lost = [event.get("lost_steps") for event in starts[1:]]
    return len(lost), sum(steps for steps in lost if isinstance(steps, int))
