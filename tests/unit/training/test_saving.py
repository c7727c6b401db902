"""The last save of a run is tried again, and a run that cannot be saved does not say that it was."""

import pytest
import torch

from dist_trainer.checkpoint.manager import Checkpoints
from dist_trainer.config.schema import DistributedConfig
from dist_trainer.distributed.context import init_distributed
from dist_trainer.errors import SavingFailedError, TrainingDivergedError
from dist_trainer.training import saving
from dist_trainer.training.saving import SECONDS_BEFORE_SAVING_AGAIN, finalize_checkpoint


class Failing(Checkpoints):
    """Saves that fail so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.attempts = 0
        self.failures = times
        self.save_again()

    def save_again(self) -> None:
        self.attempts += 1
        failed = self.attempts <= self.failures
        self.last_error = "step 9: the checkpoint could not be saved (ENOSPC)" if failed else None


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(saving, "SECONDS_BEFORE_SAVING_AGAIN", (0.0,) * len(SECONDS_BEFORE_SAVING_AGAIN))
    with init_distributed(DistributedConfig()) as world:
        yield world
    torch.set_num_threads(1)


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_save_that_succeeds_in_the_end_is_enough(world, failures):
    checkpoints = Failing(failures)
    finalize_checkpoint(checkpoints, world, save_again=checkpoints.save_again)
    assert checkpoints.attempts == 1 + failures


def test_weights_that_are_not_finite_are_no_disks_fault_and_are_not_saved_again(world):
    checkpoints = Failing(100)
    checkpoints.diverged = True
    with pytest.raises(TrainingDivergedError, match="learning_rate"):
        finalize_checkpoint(checkpoints, world, save_again=checkpoints.save_again)
    assert checkpoints.attempts == 1


def test_after_several_failures_the_message_says_what_happened_and_what_to_do(world):
    checkpoints = Failing(100)
    with pytest.raises(SavingFailedError, match=r"step 9: .*ENOSPC.* nor 3 times after that.*rerun the same command"):
        finalize_checkpoint(checkpoints, world, save_again=checkpoints.save_again)
    assert checkpoints.attempts == 4
