"""How training ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_trainer.checkpoint.state import Progress
from dist_trainer.distributed.collectives import gather_objects
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import LauncherLostError


@dataclass(frozen=True)
class TrainingResult:
    """How a call of `Trainer.fit` ended."""

    state: Literal["finished", "preempted"]
    progress: Progress
    signal_number: int = 0
    """The largest signal number that any rank received; 0: none."""
    reason: str | None = None
    """Why `Trainer.stop` was called, if that ended training."""


def result_when_finished(progress: Progress, world: DistributedContext, stop_reason: str) -> TrainingResult:
    """Of a run that has done its last step, which is an earlier one if a callback on any rank has given a `stop_reason`."""
    reasons = filter(None, gather_objects(stop_reason, world))
    return TrainingResult("finished", progress, reason=next(reasons, None))


def result_when_stopped(progress: Progress, world: DistributedContext) -> TrainingResult:
    """Of a run that was asked to stop on any rank, and has saved; the same on all ranks. Raises LauncherLostError where no
    signal asked it, but the death of a launcher.
    """
    asked = gather_objects((world.stop_request.signal_number, world.stop_request.lost_launcher), world)
    if signal_number := max(number for number, _ in asked):
        return TrainingResult("preempted", progress, signal_number)
    lost = next(reason for _, reason in asked if reason)
    raise LauncherLostError(f"{lost}; step {progress.step} is saved, rerun the same command to continue from there")
