"""What a run's time went into, over all its lives: steps that count, validation, and all else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_trainer.tracking.lenient_json import number
from dist_trainer.tracking.run_history import RunHistory, last_step, read_events, read_run
from dist_trainer.tracking.step_counter import steps_done

START_EVENTS = ("start", "resume")


@dataclass(frozen=True)
class Goodput:
    """Seconds since the run first began, standing still between its lives included."""

    wall_seconds: float = 0.0
    step_seconds: float = 0.0
    """In steps that stand in metrics.jsonl (those that were lost and done again count once), but for what follows."""
    data_seconds: float = 0.0
    """Of steps, waiting for data."""
    validation_seconds: float = 0.0
    restarts: int = 0
    """Starts in this folder after the first; that one may have begun at another run's checkpoint."""
    lost_steps: int = 0
    """Steps that had to be done again, since they came after the checkpoint that was gone on from."""

    @property
    def useful_seconds(self) -> float:
        """In steps and validation."""
        return self.step_seconds + self.data_seconds + self.validation_seconds

    @property
    def share(self) -> float:
        """Useful over all; from 0 to 1."""
        return self.useful_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0


def goodput(run: RunHistory, *, now: float | None = None) -> Goodput:
    """What `run` made of the time up to `now` (unix seconds; None: up to its last line)."""
    times = [t for t in (*run.train["time"], *run.validation["time"]) if math.isfinite(t)]
    times += [event["time"] for event in run.events if math.isfinite(event["time"])]
    starts = _starts(run.events)
    if not starts:
        return Goodput()
    first = starts[0]
    began = number(first.get("began"))  # before imports and tokenising, which lie inside the time of later starts too
    steps = data = 0.0
    before = first["step"]  # steps up to there are another run's
    for step, seconds, waited in zip(run.train["step"], run.train["step_seconds"], run.train["data_seconds"], strict=True):
        waited = waited if math.isfinite(waited) else 0.0
        if math.isfinite(seconds):
            steps += (step - before) * (seconds - waited)
            data += (step - before) * waited
        before = step
    restarts, lost_steps = _restarts(starts)
    return Goodput(
        wall_seconds=(max(times) if now is None else now) - (began if math.isfinite(began) else first["time"]),
        step_seconds=steps,
        data_seconds=data,
        validation_seconds=sum(seconds for seconds in run.validation["seconds"] if math.isfinite(seconds)),
        restarts=restarts,
        lost_steps=lost_steps,
    )


def goodput_of(folder: Path, *, now: float) -> Goodput:
    """That of the run in `folder`."""
    return goodput(read_run(folder), now=now)


def restarts_of(folder: Path) -> tuple[int, int]:
    """How often the run in `folder` was started again, and how many steps were lost to that."""
    return _restarts(_starts(read_events(folder)))


def steps_to_redo(folder: Path, *, start_step: int) -> int:
    """Steps past `start_step` that the run in `folder` has done, and will do again."""
    return max(0, last_step(folder) - start_step, steps_done(folder) - start_step)


def _starts(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] in START_EVENTS and math.isfinite(event["time"])]


def _restarts(starts: list[dict[str, Any]]) -> tuple[int, int]:
    lost = [event.get("lost_steps") for event in starts[1:]]
    return len(lost), sum(steps for steps in lost if isinstance(steps, int))
