"""Where no later save can make up for a failed one: after the last step, and after too many failures in a row."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

from dist_trainer.checkpoint.manager import Checkpoints
from dist_trainer.config.schema import CheckpointConfig
from dist_trainer.distributed.collectives import barrier, broadcast_object
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import SavingFailedError, TrainingDivergedError, counted

SECONDS_BEFORE_SAVING_AGAIN = (0.5, 1.0, 2.0)
"""Long enough for someone else's temporary file to go, short enough for who sent a signal."""


def finalize_checkpoint(checkpoints: Checkpoints, world: DistributedContext, *, save_again: Callable[[], None]) -> None:
    """Return when the last checkpoint is on the disk. Raises, on all ranks, SavingFailedError where it cannot be saved, and
    TrainingDivergedError where it must not be: after the last step no other one comes whose loss would tell.
    """
    for pause in (*SECONDS_BEFORE_SAVING_AGAIN, None):
        checkpoints.wait()  # before the barrier: who has passed it may leave
        barrier(world)
        trouble, diverged = broadcast_object((checkpoints.trouble(), checkpoints.diverged()), world)
        if trouble is None:
            return
        if diverged:
            raise TrainingDivergedError(f"{trouble}; nothing of it is saved. Lower optim.learning_rate")
        if pause is not None:
            time.sleep(pause)
            save_again()
    raise SavingFailedError(
        f"{trouble}, nor {len(SECONDS_BEFORE_SAVING_AGAIN)} times after that; the steps since the last checkpoint are not "
        "saved. Make room on the disk and start the same command again: it repeats them"
    )


def stop_after_failed_saves(checkpoints: Checkpoints, world: DistributedContext, config: CheckpointConfig) -> NoReturn:
    """Raise, on all ranks, why `config.max_failures` saves in a row were not made: TrainingDivergedError where numbers are not
    finite, else SavingFailedError.
    """
    trouble, diverged = broadcast_object((checkpoints.trouble(), checkpoints.diverged()), world)
    failed = f"{counted(config.max_failures, 'checkpoint')} in a row could not be saved (checkpoint.max_failures)"
    if diverged:
        raise TrainingDivergedError(f"{trouble}; {failed}. Lower optim.learning_rate")
    last = f", the last one at {trouble}" if trouble else ""
    raise SavingFailedError(f"{failed}{last}; make room on the disk and start the same command again")
