"""One outcome for status, events and exit code; nothing is written in a folder that this job has not locked."""

from __future__ import annotations

import pytest

from dist_trainer.checkpoint.state import Progress
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError, OutOfMemoryError, StoppedError, TrainingDivergedError
from dist_trainer.run.record import RunOutcome, RunRecord
from dist_trainer.tracking.run_reader import read_status
from dist_trainer.training.saving import TrainingResult

ONE, TWO = DistributedContext.single(), DistributedContext(world_size=2)


@pytest.mark.parametrize(
    ("error", "world", "outcome"),
    [
        (StoppedError(15), ONE, RunOutcome("preempted", "SIGTERM", 75)),
        (StoppedError(15), TWO, RunOutcome("preempted", "SIGTERM", 0)),
        (TrainingDivergedError("step 3"), ONE, RunOutcome("failed", "diverged: step 3", 3)),
        (OutOfMemoryError("one line", "advice"), ONE, RunOutcome("failed", "one line", 1)),
        (ConfigError("seed: no"), ONE, RunOutcome("failed", "seed: no", 2)),
        (ZeroDivisionError("by zero"), ONE, RunOutcome("failed", "ZeroDivisionError: by zero", 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_has_one_outcome(error, world, outcome):
    assert RunOutcome.of_error(error, world) == outcome


def test_so_has_training():
    assert RunOutcome.of_result(TrainingResult("finished", Progress(), reason="early"), ONE) == RunOutcome(
        "finished", "early", 0
    )
    preempted = TrainingResult("preempted", Progress(), 2)
    assert RunOutcome.of_result(preempted, ONE) == RunOutcome("preempted", "SIGINT", 75)
    assert RunOutcome.of_result(preempted, TWO).exit_code == 0


def test_a_rank_that_is_lost_is_recorded_once_the_folder_is_locked(tmp_path):
    config = TrainingConfig(output_dir=str(tmp_path), run_name="run")
    (tmp_path / "run").mkdir()
    record = RunRecord(config, began=0.0)
    record.on_fatal("rank 1 is gone")
    assert read_status(tmp_path / "run") == {}
    with pytest.raises(KeyError), record.attempt(None, DistributedContext(rank=1, world_size=2)):
        raise KeyError
    assert read_status(tmp_path / "run") == {}, "rank 0 is there to record it"
