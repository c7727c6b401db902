"""Digests of the weights during training: which steps have one, of which weights, and what waits for them."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dist_trainer.checkpoint.digest import weights_digest
from dist_trainer.training import digests
from dist_trainer.training.digests import WeightDigests


class Lines:
    """Keeps lines, and what was there when they were synced."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.synced: list[int] = []

    def log(self, line: dict[str, Any]) -> None:
        self.logged.append(line)

    def sync(self) -> None:
        self.synced = [line["step"] for line in self.logged]


class Switching(torch.optim.SGD):
    """Evaluates the negative of the weights that it trains."""

    def train(self) -> None:
        self._negate()

    eval = train

    def _negate(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.neg_()


def a_trainer(*, resumed_at: int = 0, is_main: bool = True, optimizer: type = torch.optim.SGD) -> tuple[WeightDigests, Any]:
    """Digests every 3 steps of 10, and what they need of a trainer."""
    model = nn.Linear(2, 2)
    lines = Lines()
    watch = WeightDigests(3, model, lines)
    trainer = SimpleNamespace(
        model=model,
        optimizer=optimizer(model.parameters(), lr=0.1),
        progress=SimpleNamespace(step=resumed_at),
        max_steps=10,
        world=SimpleNamespace(is_main=is_main),
        log=watch.log,
        lines=lines,
    )
    return watch, trainer


def digest_of(model: nn.Module) -> str:
    return weights_digest(model.state_dict().items())


def train(watch: WeightDigests, trainer: Any) -> dict[int, str]:
    """Step → digest of the weights after it, whether logged or not."""
    expected = {}
    watch.on_fit_start(trainer)
    for step in range(trainer.progress.step + 1, 11):
        with torch.no_grad():
            trainer.model.weight.add_(1)
        expected[step] = digest_of(trainer.model)
        watch.on_step_end(trainer, SimpleNamespace(step=step))  # type: ignore[arg-type]
    watch.close(trainer, None)
    return expected


def test_each_step_that_is_due_and_the_last_one_have_the_digest_of_their_own_weights():
    watch, trainer = a_trainer()
    expected = train(watch, trainer)
    assert trainer.lines.logged == [{"kind": "digest", "step": step, "digest": expected[step]} for step in (3, 6, 9, 10)]


@pytest.mark.parametrize(("resumed_at", "steps"), [(6, [6, 9, 10]), (7, [9, 10])])
def test_a_run_that_resumes_logs_the_digest_that_it_may_have_been_killed_before(resumed_at, steps):
    watch, trainer = a_trainer(resumed_at=resumed_at)
    train(watch, trainer)
    assert [line["step"] for line in trainer.lines.logged] == steps


def test_other_ranks_compute_none():
    watch, trainer = a_trainer(is_main=False)
    train(watch, trainer)
    assert trainer.lines.logged == []


def test_it_is_that_of_the_weights_which_checkpoints_hold():
    watch, trainer = a_trainer(optimizer=Switching)
    before = digest_of(trainer.model)
    trainer.optimizer.eval()
    evaluated = digest_of(trainer.model)
    trainer.optimizer.train()
    watch.on_step_end(trainer, SimpleNamespace(step=3))  # type: ignore[arg-type]
    assert digest_of(trainer.model) == before
    watch.close(trainer, None)
    assert trainer.lines.logged[0]["digest"] == evaluated != before


def test_training_goes_on_and_a_checkpoint_waits_until_the_digests_before_it_are_logged(monkeypatch):
    is_quick = threading.Event()
    monkeypatch.setattr(digests, "weights_digest", lambda weights: is_quick.wait(60) and weights_digest(weights))
    watch, trainer = a_trainer()
    expected = digest_of(trainer.model)
    watch.on_step_end(trainer, SimpleNamespace(step=3))  # type: ignore[arg-type]
    with torch.no_grad():
        trainer.model.weight.add_(1)
    assert trainer.lines.logged == []
    publishing = threading.Thread(target=watch.sync)
    publishing.start()
    is_quick.set()
    publishing.join()
    assert trainer.lines.synced == [3]
    assert trainer.lines.logged[0]["digest"] == expected


@pytest.mark.parametrize("what", ["weights_digest", "start_host_copy"])
def test_one_that_cannot_be_computed_costs_a_warning_and_changes_no_weights(monkeypatch, caplog, what):
    def fail(*_: Any, **__: Any) -> str:
        raise MemoryError("no room")

    monkeypatch.setattr(digests, what, fail)
    monkeypatch.setattr(digests.log, "propagate", True)
    watch, trainer = a_trainer(optimizer=Switching)
    before = digest_of(trainer.model)
    watch.on_step_end(trainer, SimpleNamespace(step=3))  # type: ignore[arg-type]
    watch.close(trainer, None)
    assert "step 3: no digest of the weights (MemoryError: no room); training continues" in caplog.text
    assert trainer.lines.logged == []
    assert digest_of(trainer.model) == before
