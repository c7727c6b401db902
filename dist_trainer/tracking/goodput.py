"""What a run's time went into, over all its lives: steps that count, validation, and all else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dist_trainer.tracking.run_history import RunHistory, last_step, number, read_run

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
    """Steps that were logged and had to be done again, since they came after the checkpoint that was gone on from."""

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
    starts = [event for event in run.events if event["event"] in START_EVENTS and math.isfinite(event["time"])]
    if not starts:
        return Goodput()
    first, *restarts = starts
    began = number(first.get("began"))  # before imports and tokenising, which lie inside the time of later starts too
    steps = data = 0.0
    before = first["step"]  # steps up to there are another run's
    for step, seconds, waited in zip(run.train["step"], run.train["step_seconds"], run.train["data_seconds"], strict=True):
        waited = waited if math.isfinite(waited) else 0.0
        if math.isfinite(seconds):
            steps += (step - before) * (seconds - waited)
            data += (step - before) * waited
        before = step
    lost = [event.get("lost_steps") for event in restarts]
    return Goodput(
        wall_seconds=(max(times) if now is None else now) - (began if math.isfinite(began) else first["time"]),
        step_seconds=steps,
        data_seconds=data,
        validation_seconds=sum(seconds for seconds in run.validation["seconds"] if math.isfinite(seconds)),
        restarts=len(restarts),
        lost_steps=sum(number for number in lost if isinstance(number, int)),
    )


def goodput_of(folder: Path, *, now: float) -> Goodput:
    """That of the run in `folder`."""
    return goodput(read_run(folder), now=now)


def steps_to_redo(folder: Path, *, start_step: int) -> int:
    """Logged steps past `start_step`, which the run in `folder` will do again."""
    return max(0, last_step(folder) - start_step)
