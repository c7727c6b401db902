"""With distributed.reduction exact, the bits of losses, norms and weights do not depend on the number of ranks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dist_trainer.config.schema import DistributedConfig
from dist_trainer.distributed import exchange
from dist_trainer.distributed.context import DistributedContext, init_distributed
from dist_trainer.parallel import reduction
from dist_trainer.parallel.ddp import ddp
from dist_trainer.parallel.reduction import ExactReduction, FastReduction, Reduction
from tests.distributed.ranks import run_ranks

MICRO_BATCHES = 12


class Lopsided(nn.Module):
    """Which matrices a loss depends on varies; shapes do not divide into shards."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrices = nn.ParameterList(nn.Parameter(torch.randn(5, size, generator=generator)) for size in (3, 7, 50))
        self.matrices.append(nn.Parameter(torch.randn(6, 4, generator=generator).t()))  # not in C order
        self.never_used = nn.Parameter(torch.ones(3))

    def forward(self, micro_batch: int) -> torch.Tensor:
        scale = torch.randn((), generator=torch.Generator().manual_seed(micro_batch)) * 10.0 ** (micro_batch % 5)
        used = [matrix for index, matrix in enumerate(self.matrices) if (micro_batch + index) % 3]
        return sum(((matrix * scale).sin() * scale).sum() for matrix in used)


def summed_gradients(world: DistributedContext) -> list[bytes | None]:
    model = ddp(Lopsided(), world)
    exact = ExactReduction(model, world, MICRO_BATCHES // world.world_size)
    for _ in range(2):
        a_step(model, exact, world)
    return [None if parameter.grad is None else parameter.grad.numpy().tobytes() for parameter in model.parameters()]


def a_step(model: nn.Module, reduction: Reduction, world: DistributedContext) -> None:
    model.zero_grad()
    each = MICRO_BATCHES // world.world_size
    for index in range(each):
        with reduction.micro_batch(index):
            (model(world.rank * each + index) * reduction.divisor).backward()


def fast_after_exact() -> float:
    """The largest relative difference between both sums."""
    with init_distributed(DistributedConfig()) as world:
        model, sums = ddp(Lopsided(), world), []
        for kind in (ExactReduction, FastReduction):
            a_step(model, kind(model, world, MICRO_BATCHES // world.world_size), world)
            sums.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    return max(float((fast - exact).norm() / exact.norm()) for exact, fast in zip(*sums, strict=True))


def gradients_of_rank(ranks_per_machine: int | None = None, *, shares_memory: bool = True) -> list[bytes | None]:
    torch.set_num_threads(1)
    if not shares_memory:
        exchange.SharedMemory = exchange.AllToAll
    with init_distributed(DistributedConfig()) as world:
        local = ranks_per_machine or world.world_size
        return summed_gradients(replace(world, local_rank=world.rank % local, local_world_size=local))


@pytest.mark.parametrize(
    ("ranks", "ranks_per_machine", "shares_memory"),
    [(2, None, True), (3, None, False), (6, 3, True), (4, 2, False), (6, 1, True)],
)
def test_gradients_are_one_sum_on_any_ranks_and_machines_over_any_transport(ranks, ranks_per_machine, shares_memory):
    expected = summed_gradients(DistributedContext.single())
    assert expected[0] is None, "never used"
    for gradients in run_ranks(ranks, lambda: gradients_of_rank(ranks_per_machine, shares_memory=shares_memory)):
        assert gradients == expected


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_large_model_s_micro_batches_beyond_the_limit_are_added_in_order_before_the_tree(monkeypatch, ranks):
    all_leaves = summed_gradients(DistributedContext.single())
    monkeypatch.setattr(reduction, "LARGE_MODEL", 100)
    monkeypatch.setattr(reduction, "LEAVES_OF_LARGE_MODELS", 4)
    expected = summed_gradients(DistributedContext.single())
    assert expected != all_leaves
    for gradients in run_ranks(ranks, gradients_of_rank):
        assert gradients == expected


@pytest.mark.parametrize(("micro_batches", "copies"), [(1, 0), (2, 0), (4, 1), (6, 2), (8, 2), (32, 4), (64, 5), (128, 5)])
def test_as_many_copies_of_the_gradients_wait_as_a_run_is_told(monkeypatch, micro_batches, copies):
    monkeypatch.setattr(reduction, "LARGE_MODEL", 100)
    model = Lopsided()
    exact = ExactReduction(model, DistributedContext.single(), micro_batches)
    assert exact.gradient_copies == copies
    most = 0
    for index in range(micro_batches):
        with exact.micro_batch(index):
            model(index).backward()
            most = max(most, len(exact._sums))
    assert most == copies or (micro_batches == 6 and most < copies), "only a bound if the tree is ragged"


def test_a_model_may_be_reduced_fast_after_it_was_reduced_exactly():
    for difference in run_ranks(2, fast_after_exact):
        assert difference < 1e-5
