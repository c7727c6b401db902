"""Numbers that are not finite: all ranks agree before the update, and nothing of them is ever saved."""

import math

import pytest
import torch
from safetensors.torch import load_file

from dist_trainer.errors import TrainingDivergedError
from dist_trainer.exit_codes import EXIT_FINISHED
from tests.distributed.small_runs import command, folder, small_config, status
from tests.faults.faults import do, poison_gradient

EXIT_DIVERGED = TrainingDivergedError.exit_code
"""3, says the contract."""


def laid(fault):
    """A fault in each of several ranks: `command` calls it with the rank's trainer, before that trains."""
    return lambda _trainer: fault()


def saved(config):
    return sorted(path.name for path in (folder(config) / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("dtype", "value"), [("fp32", math.nan), ("bf16", math.inf)])
def test_a_poisoned_gradient_on_one_of_two_ranks_ends_both_before_the_update(stories, tmp_path, rank, dtype, value):
    config = small_config(stories, tmp_path, precision__dtype=dtype, checkpoint__every_steps=2)
    poison = poison_gradient(rank=rank, at_step=5, value=value)
    assert command(config, 2, before=laid(poison)) == [EXIT_DIVERGED, EXIT_DIVERGED]
    assert EXIT_DIVERGED == 3
    assert status(config)["state"] == "failed"
    assert status(config)["reason"].startswith("diverged: step 5")
    assert saved(config) == ["step-00000002", "step-00000004"]


def test_where_updates_are_skipped_the_run_goes_on_without_that_one(run, undisturbed):
    config = run.but(train__on_non_finite="skip")
    assert run.start(poison_gradient(at_step=5), config=config).code == EXIT_FINISHED
    assert [line["step"] for line in run.lines() if line["skipped"]] == [5]
    # Up to there, all is as it was; the loss of the skipped step is no number, and null in JSON.
    assert [line["loss"] for line in run.lines()][:4] == [line["loss"] for line in undisturbed.lines()][:4]
    assert run.lines()[4]["loss"] is None
    assert all(tensor.isfinite().all() for tensor in load_file(run.checkpoints / "latest" / "model.safetensors").values())


def test_the_same_command_goes_on_from_before_a_run_diverged(run, undisturbed):
    assert run.start(poison_gradient(at_step=8)).code == EXIT_DIVERGED
    assert run.status()["exit_code"] == EXIT_DIVERGED
    assert run.saved_steps()[-1] == 6
    run.finish()
    run.equals(undisturbed)


@pytest.mark.parametrize("step", [8, 12], ids=["in the middle", "at the very end"])
def test_weights_that_are_not_finite_are_not_saved_and_the_run_says_that_it_diverged(run, undisturbed, step):
    @torch.no_grad()
    def spoil(trainer):
        next(trainer.model.parameters()).view(-1)[0] = math.nan

    ended = run.start(do(spoil, at_step=step))
    assert ended.code == EXIT_DIVERGED, ended.said
    assert run.status()["reason"].startswith("diverged: ")
    assert max(run.saved_steps()) < step
    assert (run.checkpoints / "best").resolve().is_dir()
    run.finish()
    run.equals(undisturbed)
