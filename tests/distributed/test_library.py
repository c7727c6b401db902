"""Modules of a user's own, trained from Python on several ranks: the programs of docs/library.md, and what holds for any."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_trainer import (
    CheckpointManager,
    Trainer,
    TrainingConfig,
    create_dataloaders,
    init_distributed,
    make_weight_saver,
    parallelize,
)
from dist_trainer.config.schema import (
    BatchConfig,
    CheckpointConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
)
from dist_trainer.data.batch import Batch
from dist_trainer.models.loss import model_loss
from dist_trainer.models.weights import load_weights
from dist_trainer.optim.registry import build_optimizer
from dist_trainer.optim.schedules import build_schedule
from dist_trainer.training.step import StepResult
from dist_trainer.training.validation import LossFunction
from tests.distributed.ranks import run_ranks

ROWS = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 9, 200)[:, None]
PAIRS = [(row, (row.sum() > 0).long()) for row in ROWS]
CONFIG = TrainingConfig(
    batch=BatchConfig(global_batch_size=24, micro_batch_size=4),
    optim=OptimConfig(learning_rate=1e-2),
    train=TrainConfig(max_steps=8),
    validation=ValidationConfig(every_steps=4),
    checkpoint=CheckpointConfig(every_steps=4),
    tracking=TrackingConfig(log_every_steps=1),
)


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "library.md").read_text("utf-8")
EXAMPLES = [code for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) if "trainer.fit()" in code]


def run_example(code: str, folder: Path) -> Any:
    """What the program's trainer ends with, run in `folder` on this rank as a file would be."""
    torch.set_num_threads(1)
    os.chdir(folder)
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "docs/library.md", "exec"), found)
    return found["trainer"].progress


def shorter(code: str) -> str:
    """The program with a fifth of its steps: each has 24 micro-batches."""
    return re.sub(r"_steps=(\d+)", lambda found: f"_steps={int(found[1]) // 5}", code)


BEST_LOSS = 0.5255735
"""Of the first program after 20 steps."""


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_programs_of_the_page_run(world_size, tmp_path, capfd):
    code, _ = EXAMPLES
    outcomes = run_ranks(world_size, lambda: run_example(shorter(code), tmp_path))
    assert {progress.step for progress in outcomes} == {20}
    assert outcomes[0].best_loss == pytest.approx(BEST_LOSS, rel=1e-4), "the losses are the same on any number of ranks"
    assert "Warning" not in capfd.readouterr().err, "none that torch prints past Python's filters"


def test_the_program_that_saves_resumes_on_another_number_of_ranks(tmp_path, capfd):
    _, code = EXAMPLES
    code = shorter(code)
    run_ranks(2, lambda: run_example(code.replace("max_steps=60", "max_steps=30"), tmp_path))
    assert (tmp_path / "runs/sine/checkpoints/latest").resolve().name == "step-00000030"
    resumed = code.replace("trainer.resume(folder)", "assert trainer.resume(folder)")
    assert run_ranks(1, lambda: run_example(resumed, tmp_path))[0].step == 60
    assert "Warning" not in capfd.readouterr().err


def test_the_first_program_is_short():
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 26


def test_a_model_that_is_compiled_trains_on_targets_of_one_number(monkeypatch, tmp_path):
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: None)  # the rehearsals are the same without
    code = shorter(EXAMPLES[0]).replace("parallelize(model, world)", "parallelize(model, world, compile=True)")
    assert "compile=True" in code
    [progress] = run_ranks(1, lambda: run_example(code, tmp_path))
    assert progress.best_loss == pytest.approx(BEST_LOSS, rel=1e-4)


class Lines(list[dict[str, Any]]):
    """A tracker that keeps what it gets."""

    log = list.append

    def sync(self) -> None: ...

    def close(self, *, state: str, reason: str) -> None: ...

    def losses(self, kind: str) -> list[float]:
        return [line["loss"] for line in self if line["kind"] == kind]


class StopAfter:
    """A callback that asks to stop as a signal would."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        assert not gc.isenabled(), "all ranks collect garbage after the same micro-batches"
        if result.step == self.step:
            trainer.world.stop_request.signal_number = 15


def fit(
    make: Callable[[], nn.Module],
    folder: Path,
    *,
    stop_after: int | None = None,
    loss_function: LossFunction = model_loss,
    optimizer_of: Callable[[nn.Module], Optimizer] = lambda model: build_optimizer(CONFIG.optim, model),
) -> tuple[Lines, dict[str, np.ndarray]]:
    """Train on this rank, from where `folder` is, as docs/library.md does; the lines of rank 0, and the model's state."""
    torch.set_num_threads(1)
    with init_distributed(CONFIG.distributed) as world:
        torch.manual_seed(0)
        model = make()
        train, validation = create_dataloaders(CONFIG, world, train_dataset=PAIRS[:170], validation_dataset=PAIRS[170:])
        lines = Lines()
        trainer = Trainer(
            CONFIG,
            world,
            model=parallelize(model, world),
            optimizer=optimizer_of(model),
            train_data=train,
            validation_data=validation,
            loss_function=loss_function,
            checkpoints=CheckpointManager(folder, CONFIG.checkpoint, save_model_fn=make_weight_saver(model))
            if world.is_main
            else None,
            tracker=lines,
            callbacks=[StopAfter(stop_after)],
        )
        trainer.resume(folder)
        trainer.fit()
        assert gc.isenabled()
    return lines, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def validation_loss(model: nn.Module) -> float:
    """By torch alone."""
    inputs, targets = torch.stack([row for row, _ in PAIRS[170:]]), torch.stack([target for _, target in PAIRS[170:]])
    return float(F.cross_entropy(model.eval()(inputs), targets))


class Counting(nn.Module):
    """Has buffers of several types: one that is added to, one that is replaced, one that no checkpoint holds."""

    seen: Tensor
    largest: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(8))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += len(inputs)
        if self.training:
            self.largest = torch.maximum(self.largest, inputs.detach().abs().amax(0))
        self.scratch.add_(1)
        return inputs / self.largest


def with_buffers() -> nn.Module:
    return nn.Sequential(Counting(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_model_with_buffers_is_the_same_on_all_ranks_and_resumes_exactly(world_size, tmp_path):
    (whole, state), *others = run_ranks(world_size, lambda: fit(with_buffers, tmp_path / "whole"))
    for _, other in others:
        assert all(np.array_equal(other[name], tensor) for name, tensor in state.items())
    saved = with_buffers()
    load_weights(saved, tmp_path / "whole" / "latest")
    assert whole.losses("validation")[-1] == pytest.approx(validation_loss(saved), rel=1e-5)

    micro_batches = 8 * 24 // 4 // world_size  # of rank 0; no rehearsal and no validation has left a trace
    assert int(state["2.num_batches_tracked"]) == micro_batches
    assert int(state["0.seen"]) == 4 * micro_batches

    [(first, _), *_] = run_ranks(world_size, lambda: fit(with_buffers, tmp_path / "stopped", stop_after=5))
    [(then, resumed), *_] = run_ranks(world_size, lambda: fit(with_buffers, tmp_path / "stopped"))
    assert 5 <= len(first.losses("train")) < 8
    for kind in ("train", "validation"):
        assert first.losses(kind) + then.losses(kind) == whole.losses(kind)
    assert all(np.array_equal(resumed[name], tensor) for name, tensor in state.items())


class Growing(nn.Module):
    """Has a table that grows with the batches that this rank has had, as some do for longer sequences."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        needed = int(inputs.abs().max())
        if needed > len(self.table):
            self.table = torch.zeros(needed)
        return inputs + self.table[0]


def test_buffers_that_have_grown_to_other_sizes_on_other_ranks_stay_what_they_are(tmp_path):
    make = lambda: nn.Sequential(Growing(), nn.Linear(8, 2))  # noqa: E731
    [(one, _)] = run_ranks(1, lambda: fit(make, tmp_path / "1"))
    [(two, _), _] = run_ranks(2, lambda: fit(make, tmp_path / "2"))
    assert two.losses("train") == one.losses("train")


class KeepsItsOutput(torch.autograd.Function):
    """Its graph is a cycle, which Python's garbage collector alone frees."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        KeepsItsOutput.alive.add(ctx)
        ctx.output = inputs * 1
        return ctx.output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def test_the_activations_of_a_graph_that_is_a_cycle_are_freed_after_each_micro_batch(tmp_path):
    def loss_function(model: nn.Module, batch: Batch) -> Tensor:
        loss = KeepsItsOutput.apply(model_loss(model, batch))
        assert len(KeepsItsOutput.alive) <= 2, "this one, and at most one in validation"
        return loss

    run_ranks(1, lambda: fit(mlp, tmp_path, loss_function=loss_function))


class WithSpareParts(nn.Module):
    """`head` makes the logits, `sometimes` adds to those of a few rows; `output` is returned and `never` not even that."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.sometimes, self.output, self.never = (nn.Linear(8, 2) for _ in range(4))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits, is_rare = self.head(inputs), inputs[:, 0] > 12
        if is_rare.any():
            logits = logits + is_rare[:, None] * self.sometimes(inputs)
        return logits, self.output(inputs)

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self(batch.input_ids)[0], batch.targets, reduction="sum")


@pytest.mark.parametrize(
    "loss_function",
    [
        lambda model, batch: F.cross_entropy(model(batch.input_ids)[0], batch.targets, reduction="sum"),
        lambda model, batch: model.loss(batch),
        lambda model, batch: (model.loss(batch) + model.loss(batch)) / 2,
    ],
    ids=["forward", "a method of its own", "several passes"],
)
def test_parameters_without_a_gradient_stay_unchanged_on_any_number_of_ranks(loss_function, tmp_path):
    rare = [bool(row[0] > 12) for row, _ in PAIRS[:170]]
    assert 0 < sum(rare) < 10, "on few ranks and in few batches"
    outcomes = [
        run_ranks(ranks, lambda ranks=ranks: fit(WithSpareParts, tmp_path / str(ranks), loss_function=loss_function))
        for ranks in (1, 3)
    ]
    torch.manual_seed(0)
    fresh = {name: tensor.numpy() for name, tensor in WithSpareParts().state_dict().items()}
    (lines, state), *_ = outcomes[0]
    for name, tensor in state.items():
        is_spare = name.startswith(("output", "never"))
        assert np.array_equal(tensor, fresh[name]) == is_spare, name
    for several in outcomes[1:]:
        for kind in ("train", "validation"):
            assert several[0][0].losses(kind) == lines.losses(kind)
        for _, other in several:
            assert all(np.array_equal(other[name], tensor) for name, tensor in state.items())


class AdaptsItsStep(Optimizer):
    """Keeps the size of its steps, and their number, in its parameter groups, as Prodigy does."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 1.0, "d": 1e-3, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["d"], group["k"] = group["d"] * 1.3, group["k"] + 1
            for parameter in group["params"]:
                parameter -= group["lr"] * group["d"] * parameter.grad


class ScheduleFree(Optimizer):
    """SGD that trains other weights than it evaluates, as schedule-free optimizers do (Defazio 2024, arXiv:2405.15682)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05, "k": 0, "train_mode": False})

    def train(self) -> None:
        self._switch(True, weight=0.1)

    def eval(self) -> None:
        self._switch(False, weight=1 - 1 / 0.9)

    @torch.no_grad()
    def _switch(self, mode: bool, *, weight: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"] if group["train_mode"] != mode else []:
                if "z" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["z"], weight)
            group["train_mode"] = mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                y.lerp_(z, 1 / group["k"]).sub_(y.grad, alpha=0.1 * group["lr"])
                z.sub_(y.grad, alpha=group["lr"])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def test_an_optimizer_with_other_weights_to_evaluate_validates_and_saves_those_and_resumes_exactly(tmp_path):
    def run(name: str, stop_after: int | None = None) -> tuple[Lines, dict[str, np.ndarray]]:
        optimizer_of = lambda model: ScheduleFree(model.parameters())  # noqa: E731
        act = functools.partial(fit, mlp, tmp_path / name, stop_after=stop_after, optimizer_of=optimizer_of)
        return run_ranks(2, act)[0]

    whole, state = run("whole")
    first, _ = run("stopped", stop_after=5)
    then, resumed = run("stopped")
    for kind in ("train", "validation"):
        assert first.losses(kind) + then.losses(kind) == whole.losses(kind)
    saved = mlp()
    load_weights(saved, tmp_path / "whole/latest")
    for name, tensor in saved.state_dict().items():
        assert np.array_equal(state[name], tensor.numpy()), "what was trained ends as what was saved"
        assert np.array_equal(resumed[name], tensor.numpy())
    assert validation_loss(saved) == pytest.approx(whole.losses("validation")[-1], rel=1e-5)


def test_gradients_of_parameters_that_the_optimizer_does_not_hold_do_not_add_up_over_steps(tmp_path):
    """They count in the norm that clips, so a run that resumes, without them, would have gone another way."""

    def run(name: str, stop_after: int | None = None) -> tuple[Lines, dict[str, np.ndarray]]:
        optimizer_of = lambda model: torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=0.1)  # noqa: E731
        act = functools.partial(fit, mlp, tmp_path / name, stop_after=stop_after, optimizer_of=optimizer_of)
        return run_ranks(1, act)[0]

    (whole, state), (first, _), (then, resumed) = run("whole"), run("stopped", 5), run("stopped")
    assert first.losses("train") + then.losses("train") == whole.losses("train")
    assert all(np.array_equal(resumed[name], tensor) for name, tensor in state.items())


def test_state_in_parameter_groups_resumes_exactly_and_each_group_has_its_own_rate(tmp_path):
    def optimizer_of(model: nn.Module) -> Optimizer:
        return AdaptsItsStep([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.25}])

    def run(name: str, stop_after: int | None = None) -> tuple[Lines, dict[str, np.ndarray]]:
        act = functools.partial(fit, mlp, tmp_path / name, stop_after=stop_after, optimizer_of=optimizer_of)
        return run_ranks(2, act)[0]

    whole, state = run("whole")
    first, _ = run("stopped", stop_after=5)
    then, resumed = run("stopped")
    assert first.losses("train") + then.losses("train") == whole.losses("train")
    assert all(np.array_equal(resumed[name], tensor) for name, tensor in state.items())
    factor = build_schedule(CONFIG.schedule, 8)
    assert [line["lr"] for line in whole if line["kind"] == "train"] == [factor(step) for step in range(8)]
    saved = json.loads((tmp_path / "whole/latest/trainer_state.json").read_text())
    assert [group["k"] for group in saved["optimizer_groups"]] == [8, 8]
