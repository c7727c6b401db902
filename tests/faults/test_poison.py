"""Numbers that are not finite: no rank updates, none is saved, and what was saved stays."""

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.small_runs import command
from tests.faults.faults import do, poison_gradient


def test_a_poisoned_gradient_on_one_rank_stops_both_before_the_update(run):
    config = run.but(precision__dtype="bf16", batch__micro_batch_size=2)
    poison = poison_gradient(rank=1, at_step=5)
    assert command(config, 2, before=lambda _: poison()) == [3, 3]
    status = run.status()
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert "step 5" in status["reason"]
    assert run.saved_steps() == [3]
    assert command(config, 2) == [0, 0]
    assert run.resumed_at()[-1] == 3


def test_a_run_that_was_stopped_by_a_poisoned_gradient_resumes_from_its_last_good_checkpoint(run, undisturbed):
    assert run.start(poison_gradient(at_step=8, value=math.inf)).code == 3
    assert run.saved_steps()[-1] == 6
    run.finish()
    run.equals(undisturbed)


def test_if_updates_are_skipped_the_run_continues_without_that_one(run, undisturbed):
    assert run.start(poison_gradient(at_step=5), config=run.but(train__on_non_finite="skip")).code == 0
    assert [line["step"] for line in run.lines() if line["skipped"]] == [5]
    assert [line["loss"] for line in run.lines()][:4] == [line["loss"] for line in undisturbed.lines()][:4]
    assert run.lines()[4]["loss"] is None  # JSON has no NaN
    assert all(tensor.isfinite().all() for tensor in load_file(run.checkpoints / "latest" / "model.safetensors").values())


@pytest.mark.parametrize("step", [8, 12], ids=["in the middle", "at the very end"])
def test_weights_that_are_not_finite_are_not_saved_and_the_run_says_that_it_diverged(run, undisturbed, step):
    @torch.no_grad()
    def spoil(trainer):
        next(trainer.model.parameters()).view(-1)[0] = math.nan

    ended = run.start(do(spoil, at_step=step))
    assert ended.code == 3, ended.said
    assert run.status()["reason"].startswith("diverged: ")
    assert max(run.saved_steps()) < step
    assert (run.checkpoints / "best").resolve().is_dir()
    run.finish()
    run.equals(undisturbed)
