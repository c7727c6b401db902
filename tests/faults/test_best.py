"""`best`, status.json and the last line name the checkpoint with the lowest validation loss of those that were saved."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_trainer.checkpoint import manager
from dist_trainer.checkpoint.folders import best_checkpoint, resume_point
from dist_trainer.checkpoint.manager import CheckpointManager
from dist_trainer.checkpoint.state import Progress, Validated, take_snapshot
from dist_trainer.config.schema import CheckpointConfig
from dist_trainer.training.validation import ValidationResult
from tests.distributed.small_runs import command
from tests.faults.conftest import a_run
from tests.faults.faults import Fault, Run, do, kill


def find(losses: dict[int, float]) -> Fault:
    """Validations find these losses, by step, and no checkpoint is left out in favour of a newer one."""

    def lay() -> None:
        from dist_trainer.training import trainer as module

        validate = module.Trainer._validate_if_due

        def validate_at(trainer: module.Trainer) -> bool:
            trainer.checkpoints.wait()
            module.evaluate = lambda *_, **__: ValidationResult(losses[trainer.progress.step], 7, None, 0.0)
            return validate(trainer)

        module.Trainer._validate_if_due = validate_at

    return lay


def refuse_to_save(*steps: int) -> Fault:
    """The disk is full whenever a checkpoint of these steps is written."""

    def lay() -> None:
        publish = manager.publish

        def publish_or_refuse(folder: Path, write, *, metadata) -> None:
            if metadata["step"] in steps:
                raise OSError(28, "No space left on device")
            publish(folder, write, metadata=metadata)

        manager.publish = publish_or_refuse

    return lay


def named_as_best(run: Run) -> tuple[int, float] | None:
    """By the link, and by status.json, which agree; None: by none."""
    status = run.status()
    named = (status["best_step"], status["best_loss"])
    if named == (None, None):
        assert not os.path.lexists(run.checkpoints / "best")
        return None
    assert os.readlink(run.checkpoints / "best") == f"step-{named[0]:08d}"
    assert (run.checkpoints / "best").is_dir()
    return named


@pytest.mark.parametrize(
    ("losses", "full_at", "best", "ranks"),
    [
        ({5: 1.0, 10: 2.0, 12: 3.0}, (5,), (10, 2.0), 2),
        ({5: 2.0, 10: 1.0, 12: 3.0}, (10,), (5, 2.0), 1),
        ({5: 3.0, 10: 1.0, 12: 2.0}, (10,), (12, 2.0), 1),
        ({5: 1.0, 10: 1.0, 12: 1.0}, (5,), (10, 1.0), 1),
        ({5: 1.0, 10: math.nan, 12: math.inf}, (5, 6), None, 1),
    ],
)
def test_a_best_checkpoint_that_could_not_be_saved_is_none(run, losses, full_at, best, ranks):
    def lay(_) -> None:
        find(losses)()
        refuse_to_save(*full_at)()

    assert command(run.config, ranks, before=lay) == [0] * ranks
    assert named_as_best(run) == best
    said = (run.folder / "logs" / "rank-0.log").read_text()
    named = f"best checkpoint step {best[0]}, validation loss {best[1]:.4f}" if best else "no best checkpoint was saved"
    assert f"finished: 12 of 12 steps; {named}; " in said


@pytest.mark.parametrize(
    ("losses", "best", "stopped_at"),
    [
        ({5: 1.0, 10: 1.0, 12: 1.0}, (5, 1.0), None),
        ({5: 1.0, 10: 1.0, 12: 1.0}, (5, 1.0), 11),
        ({5: 1.0, 10: math.nan, 12: 2.0}, (5, 1.0), 11),
        ({5: math.nan, 10: math.inf, 12: 2.0}, (12, 2.0), 11),
        ({5: 3.0, 10: math.nan, 12: 2.0}, (12, 2.0), 11),
    ],
    ids=["equal", "equal, stopped", "NaN, then a worse one", "never finite before", "NaN, then a better one"],
)
def test_the_best_one_is_the_same_whether_or_not_the_run_was_stopped(run, losses, best, stopped_at):
    if stopped_at is not None:
        saved = do(lambda trainer: trainer.checkpoints.wait(), at_step=stopped_at)
        assert run.start(find(losses), saved, kill(at_step=stopped_at)).was_killed
    ended = run.start(find(losses))
    assert ended.code == 0, ended.said
    assert named_as_best(run) == best


def test_weights_that_are_never_finite_again_end_the_run_after_max_failures(text, tmp_path):
    run = a_run(text, tmp_path / "runs", checkpoint__max_failures=2, train__on_non_finite="skip", validation__every_steps=0)

    @torch.no_grad()
    def spoil(trainer) -> None:
        next(trainer.model.parameters()).view(-1)[0] = math.nan

    assert command(run.config, 2, before=lambda _: do(spoil, at_step=4)()) == [3, 3]
    status = run.status()
    assert (status["state"], status["exit_code"], status["best_step"]) == ("failed", 3, None)
    assert "2 checkpoints in a row could not be saved (checkpoint.max_failures)" in status["reason"]
    assert "weights or optimizer state contain NaN/Inf" in status["reason"]
    assert status["step"] < 12
    assert run.saved_steps() == [3]


# ------------------------------------------------------------------------------------------- the manager alone


class Masked(nn.Module):
    """A mask of -inf, as hand-written decoders have it, once as a buffer and once as a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.frozen = nn.Parameter(torch.full((2,), -torch.inf), requires_grad=False)


def saved(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> CheckpointManager:
    def save_model(weights, into: Path) -> None:
        torch.save(weights, into / "weights")

    checkpoints = CheckpointManager(folder, CheckpointConfig(keep_last=1), save_model_fn=save_model)
    snapshot = take_snapshot(model, optimizer, scaler={}, progress=progress, metadata={})
    checkpoints.save(lambda: snapshot, is_best=False, before_publish=lambda: None)
    checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize("spoiled", [None, "weight", "average"])
def test_only_what_is_trained_is_judged(tmp_path, spoiled):
    model = Masked()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model.linear(torch.ones(2)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        if spoiled == "weight":
            model.linear.weight[0, 0] = torch.nan
        elif spoiled == "average":
            optimizer.state[model.linear.bias]["exp_avg"][0] = torch.inf
    checkpoints = saved(tmp_path, model, optimizer, Progress(3, validated_step=3, validation_loss=1.0))
    assert checkpoints.diverged == (spoiled is not None)
    named = {None: None, "weight": "(linear.weight)", "average": "(linear.bias: optimizer's exp_avg)"}[spoiled]
    said = None if named is None else f"step 3: weights or optimizer state contain NaN/Inf {named}; checkpoint skipped"
    assert checkpoints.last_error == said
    assert (tmp_path / "step-00000003").exists() == (spoiled is None)
    assert checkpoints.best(Validated(1.0, 3)) == (Validated(1.0, 3) if spoiled is None else None)


def test_a_best_checkpoint_that_someone_deleted_is_none_any_more(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    for step, loss in ((1, 2.0), (2, 1.0)):
        saved(tmp_path, model, optimizer, Progress(step, validated_step=step, validation_loss=loss))
    assert best_checkpoint(tmp_path) == Validated(1.0, 2)
    checkpoints = CheckpointManager(tmp_path, CheckpointConfig(), save_model_fn=lambda weights, into: None)
    checkpoints.set_best(Validated(1.0, 2))
    (tmp_path / "step-00000002").rename(tmp_path.with_name("elsewhere"))
    assert checkpoints.best(Validated(1.0, 2)) is None
    saved(tmp_path, model, optimizer, Progress(3, validated_step=3, validation_loss=3.0))
    assert os.readlink(tmp_path / "best") == "step-00000003"
    found = resume_point(tmp_path, keep_last=1)
    assert found is not None
    assert found[1].best == Validated(3.0, 3)
