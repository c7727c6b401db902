"""The sentinel leaves no trace, and names the rank on which a bit flips: in a gradient, a weight, or the optimizer's state."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_trainer import Trainer, TrainingConfig, create_dataloaders, init_distributed, parallelize
from dist_trainer.config.rules import rule_violations
from dist_trainer.config.schema import BatchConfig, DistributedConfig, OptimConfig, TrainConfig, ValidationConfig
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError, RanksDisagreeError
from dist_trainer.models.loss import cross_entropy_sum
from dist_trainer.optim.registry import build_optimizer
from dist_trainer.run.build import check_entries
from dist_trainer.training.precision import Precision
from dist_trainer.training.sentinel import choose, majority
from tests.distributed.ranks import run_ranks
from tests.distributed.small_runs import changed, command, folder, on_rank, small_config, status

STEPS, MICRO_BATCHES = 4, 6
ROWS = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
PAIRS = [(row, (row.sum() > 0).long()) for row in ROWS]
HERE = socket.gethostname()
CONFIG = TrainingConfig(
    seed=5,
    batch=BatchConfig(global_batch_size=12, micro_batch_size=2),
    optim=OptimConfig(learning_rate=1e-2),
    train=TrainConfig(max_steps=STEPS),
    validation=ValidationConfig(every_steps=0),
)
Plant = Callable[[Trainer], None]


class Model(nn.Module):
    """What it computes depends on dropout and on buffers that each pass changes, and it does not use all parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(2, 2)
        self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.register_buffer("passes", torch.ones(()))

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            self.passes *= 1.5
        return self.second(self.dropout(self.norm(self.first(rows)).relu() * self.passes))


def flip(tensor: Tensor) -> None:
    """The lowest bit of one number."""
    with torch.no_grad():
        tensor.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)


def flip_gradients(*, once: bool) -> Plant:
    """In every backward pass, or in one of step 3."""

    def plant(trainer: Trainer) -> None:
        left = [1]

        def flipped(gradient: Tensor) -> Tensor:
            if once and (trainer.progress.step < 2 or not left):
                return gradient
            left.clear()
            gradient = gradient.clone()
            flip(gradient)
            return gradient

        trainer.model.module.second.weight.register_hook(flipped)

    return plant


def flip_after_update(step: int, of: Callable[[Trainer], Tensor]) -> Plant:
    def plant(trainer: Trainer) -> None:
        update = trainer.precision.step

        def then_flip(*arguments: Any) -> None:
            update(*arguments)
            if trainer.progress.step == step - 1:
                flip(of(trainer))

        trainer.precision.step = then_flip

    return plant


def a_weight(trainer: Trainer) -> Tensor:
    return trainer.model.module.first.weight


def a_moment(trainer: Trainer) -> Tensor:
    return trainer.optimizer.state[trainer.model.module.first.weight]["exp_avg"]


def trained(world: DistributedContext, plant: Plant | None = None, wrong_loss: float = 0.0, **changes: Any) -> Any:
    """The bits of losses and weights after STEPS steps, or the message of the error that ended them."""
    config = changed(CONFIG, **changes)
    model = Model()
    trainer = Trainer(
        config,
        world,
        model=parallelize(model, world),
        optimizer=build_optimizer(replace(config.optim, name="adamw"), model),
        train_data=create_dataloaders(config, world, train_dataset=PAIRS).train,
        precision=Precision("fp16", world.device),
        loss_function=lambda model, batch: cross_entropy_sum(model(batch.input_ids), batch.targets) + wrong_loss * world.rank,
    )
    losses: list[list[float]] = []
    trainer.callbacks = type(trainer.callbacks)([Losses(losses)])
    if plant is not None:
        plant(trainer)
    try:
        trainer.fit()
    except RanksDisagreeError as error:
        return str(error)
    return losses, [tensor.numpy().tobytes() for tensor in model.state_dict().values()]


class Losses:
    def __init__(self, losses: list[list[float]]) -> None:
        self.losses = losses

    def on_step_end(self, trainer: Trainer, result: Any) -> None:
        self.losses.append([loss.item() for loss in result.losses])


def on_ranks(ranks: int, tries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `trained` returns by the name of the try; errors are the same on all ranks."""

    def rank() -> dict[str, Any]:
        torch.set_num_threads(1)
        with init_distributed(DistributedConfig()) as world:
            return {name: trained(world, **keywords) for name, keywords in tries.items()}

    of_ranks = run_ranks(ranks, rank)
    for name, outcome in of_ranks[0].items():
        if isinstance(outcome, str):
            assert all(other[name] == outcome for other in of_ranks)
    return of_ranks[0]


SENTINEL = {"distributed__sentinel_every_steps": 1}
REDO = {**SENTINEL, "distributed__on_disagreement": "redo"}


def of_choice(step: int, role: str, ranks: int) -> int:
    """The owner or checker in `step`."""
    return getattr(choose(CONFIG.seed, step - 1, ranks=ranks, micro_batches=MICRO_BATCHES // ranks), role)


def test_two_ranks_leave_no_trace_and_tell_a_passing_fault_from_a_lasting_one():
    owner = of_choice(3, "owner", 2)
    outcomes = on_ranks(
        2,
        {
            "without": {},
            "with": SENTINEL,
            "redone": {**REDO, "plant": on_rank(1 - owner, flip_gradients(once=True))},
            "once": {**SENTINEL, "plant": on_rank(1 - owner, flip_gradients(once=True))},
            "loss": {**SENTINEL, "wrong_loss": 2.0**-10},
            "always": {**REDO, "plant": on_rank(1, flip_gradients(once=False))},
            "state": {**SENTINEL, "plant": on_rank(1, flip_after_update(2, a_moment))},
        },
    )
    assert outcomes["with"] == outcomes["without"]
    assert outcomes["redone"] == outcomes["without"]
    both = f"ranks {{}} ({HERE}) and {{}} ({HERE})"
    assert outcomes["once"].startswith(f"step 3: {both.format(owner, 1 - owner)} have computed micro-batch ")
    first = "different bits, first in the gradient of second.weight; "
    assert f"{first}most of 4 results agree, and those of rank {1 - owner} ({HERE}) do not. " in outcomes["once"]
    assert "different bits, first in the loss; none of the 4 results" in outcomes["loss"]
    assert outcomes["always"].startswith("step 1: ranks ")
    assert f"{first}none of the 4 results" in outcomes["always"]
    assert outcomes["state"].startswith("step 2: ranks must have the same weights and optimizer state, but ")
    assert f"{both.format(0, 1)} differ and none has a majority" in outcomes["state"]
    assert "first in the optimizer's first.weight exp_avg; they were equal after step 1. " in outcomes["state"]


def test_of_three_ranks_the_third_decides():
    outcomes = on_ranks(
        3,
        {
            "without": {},
            "with": SENTINEL,
            "owner": {**SENTINEL, "plant": on_rank(of_choice(1, "owner", 3), flip_gradients(once=False))},
            "checker": {**SENTINEL, "plant": on_rank(of_choice(1, "checker", 3), flip_gradients(once=False))},
            "weight": {**SENTINEL, "plant": on_rank(2, flip_after_update(2, a_weight))},
        },
    )
    assert outcomes["with"] == outcomes["without"]
    for role in ("owner", "checker"):
        assert outcomes[role].startswith("step 1: ")
        assert f"most of 5 results agree, and those of rank {of_choice(1, role, 3)} ({HERE}) do not. " in outcomes[role]
    assert f"but rank 2 ({HERE}) differs from the others, first in first.weight; " in outcomes["weight"]


def test_the_command_stops_with_exit_code_3_and_keeps_the_checkpoint_before(stories, tmp_path, capfd):
    config = small_config(
        stories, tmp_path, distributed__sentinel_every_steps=3, checkpoint__every_steps=3, validation__every_steps=0
    )

    plant = flip_after_update(4, lambda trainer: trainer.parameters[1])
    assert command(config, 2, before=on_rank(1, plant)) == [3, 3]
    header = "  sentinel   every 3 steps a second rank computes a micro-batch as well; stops if they disagree"
    assert header in capfd.readouterr().err.splitlines()
    assert status(config)["exit_code"] == 3
    assert re.match(r"step 5: ranks must have the same .* they were equal after step 3\.", status(config)["reason"])
    assert [path.name for path in (folder(config) / "checkpoints").glob("step-*")] == ["step-00000003"]


def test_a_sentinel_needs_two_ranks_that_compute_the_same_bits():
    config = changed(TrainingConfig(), distributed__sentinel_every_steps=100)
    with pytest.raises(ConfigError, match=r"^distributed\.sentinel_every_steps: 100 needs a second rank .* set it to 0$"):
        check_entries(config, DistributedContext.single())
    assert rule_violations(config) == []
    [sentence] = rule_violations(changed(config, distributed__reduction="fast"))
    assert sentence.startswith("distributed.sentinel_every_steps: 100 needs distributed.reduction exact")


def test_each_rank_is_checked_by_each_other_and_so_is_each_micro_batch():
    choices = [choose(7, step, ranks=3, micro_batches=4) for step in range(300)]
    assert {(choice.owner, choice.checker) for choice in choices} == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert {choice.number for choice in choices} == set(range(12))
    assert all(choice.number // 4 == choice.owner for choice in choices)
    firsts = [choose(7, step, ranks=3, micro_batches=4, only_first=True) for step in range(300)]
    assert [(c.owner, c.checker, c.number) for c in firsts] == [(c.owner, c.checker, 4 * c.owner) for c in choices]


def test_a_majority_is_more_than_half():
    assert majority([b"a", b"b", b"a"]) == b"a"
    assert majority([b"a", b"b"]) is None
    assert majority([b"a", b"b", b"a", b"c"]) is None
