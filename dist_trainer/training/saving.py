"""How training is saved and how it ends: the content of checkpoints, the last save, and the result of `Trainer.fit`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from torch import nn
from torch.optim import Optimizer

from dist_trainer.checkpoint.host_copy import PinnedMemory
from dist_trainer.checkpoint.manager import Checkpoints
from dist_trainer.checkpoint.state import Progress, Snapshot, restore, take_snapshot
from dist_trainer.config.schema import CheckpointConfig
from dist_trainer.distributed.collectives import barrier, broadcast_object, gather_objects, run_and_share_errors
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import LauncherLostError, SavingFailedError, TrainingDivergedError, counted
from dist_trainer.models.weights import load_weights
from dist_trainer.optim.evaluation_weights import evaluation_weights, set_training_weights
from dist_trainer.training.precision import Precision

SECONDS_BEFORE_SAVING_AGAIN = (0.5, 1.0, 2.0)
"""Long enough for another program's temporary file to disappear, short enough for a process that was told to stop."""


class TrainingState:
    """The content of checkpoints: model, optimizer, scaler, progress, and `metadata`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, precision: Precision, metadata: Mapping[str, Any]) -> None:
        """`model` is the module itself, not wrapped."""
        self.model, self.optimizer, self.precision, self.metadata = model, optimizer, precision, metadata
        self._pinned = PinnedMemory()

    def snapshot(self, progress: Progress, *, is_last: bool) -> Snapshot:
        """A copy in host memory; `is_last`: no step follows that would change the original."""
        parts: dict[str, Any] = {"scaler": self.precision.state_dict(), "progress": progress, "metadata": self.metadata}
        with evaluation_weights(self.optimizer) as weights:
            return take_snapshot(
                self.model, self.optimizer, **parts, is_last=is_last, pinned=self._pinned, training_weights=weights
            )

    def restore(self, checkpoint: Path, world: DistributedContext) -> None:
        """Load the state in `checkpoint`. For all ranks; raises CheckpointError on all of them."""
        verifies, load_scaler = world.local_rank == 0, self.precision.load_state_dict
        load = partial(restore, load_weights=load_weights, load_scaler=load_scaler, verifies=verifies)
        weights = run_and_share_errors(world, lambda: load(checkpoint, self.model, self.optimizer))
        set_training_weights(self.optimizer, weights or {})


@dataclass(frozen=True)
class TrainingResult:
    """How a call of `Trainer.fit` ended."""

    state: Literal["finished", "preempted"]
    progress: Progress
    signal_number: int = 0
    """The largest signal number that any rank received; 0: none."""
    reason: str | None = None
    """Why `Trainer.stop` was called, if that ended training."""


def finalize_checkpoint(checkpoints: Checkpoints, world: DistributedContext, *, save_again: Callable[[], None]) -> None:
    """Return when the last checkpoint is on disk. Raises, on all ranks, SavingFailedError if it cannot be saved, and
    TrainingDivergedError if it contains NaN or infinity: after the last step, no later loss would show that.
    """
    for pause in (*SECONDS_BEFORE_SAVING_AGAIN, None):
        checkpoints.wait()  # before the barrier: a rank that has passed it may exit
        barrier(world)
        error, diverged = broadcast_object((checkpoints.last_error, checkpoints.diverged), world)
        if error is None:
            return
        if diverged:
            raise TrainingDivergedError(f"{error}. Lower optim.learning_rate")
        if pause is not None:
            time.sleep(pause)
            save_again()
    raise SavingFailedError(
        f"{error}, nor {len(SECONDS_BEFORE_SAVING_AGAIN)} times after that; the steps since the last checkpoint are not "
        "saved. Free some disk space and rerun the same command: it repeats them"
    )


def stop_after_failed_saves(checkpoints: Checkpoints, world: DistributedContext, config: CheckpointConfig) -> NoReturn:
    """Raise, on all ranks, why `config.max_failures` consecutive saves have failed: TrainingDivergedError if numbers are not
    finite, else SavingFailedError.
    """
    error, diverged = broadcast_object((checkpoints.last_error, checkpoints.diverged), world)
    failed = f"{counted(config.max_failures, 'checkpoint')} in a row could not be saved (checkpoint.max_failures)"
    if diverged:
        raise TrainingDivergedError(f"{error}; {failed}. Lower optim.learning_rate")
    last = f", the last one at {error}" if error else ""
    raise SavingFailedError(f"{failed}{last}; free some disk space and rerun the same command")


def fit_result(progress: Progress, world: DistributedContext, *, has_finished: bool, stop_reason: str) -> TrainingResult:
    """The result of training that has ended and is saved; the same on all ranks. `stop_reason`: given by a callback of this
    rank.
    """
    if not has_finished:
        return result_when_stopped(progress, world)
    reasons = filter(None, gather_objects(stop_reason, world))
    return TrainingResult("finished", progress, reason=next(reasons, None))


def result_when_stopped(progress: Progress, world: DistributedContext) -> TrainingResult:
    """The result of a run that was asked to stop on any rank, and has saved; the same on all ranks. Raises LauncherLostError if
    it was not a signal, but a launcher that has died.
    """
    requests = gather_objects((world.stop_request.signal_number, world.stop_request.lost_launcher), world)
    if signal_number := max(number for number, _ in requests):
        return TrainingResult("preempted", progress, signal_number)
    lost = next(reason for _, reason in requests if reason)
    raise LauncherLostError(f"{lost}; step {progress.step} is saved, rerun the same command to continue from there")
