"""The order in which a single process adds the gradients of its micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError
from dist_trainer.parallel.reduction import ExactReduction, FastReduction, build_reduction


def by_hand(gradients: list[Tensor]) -> Tensor:
    """The left branch has the largest power of two that is less than all."""
    if len(gradients) == 1:
        return gradients[0]
    left = 1 << ((len(gradients) - 1).bit_length() - 1)
    return by_hand(gradients[:left]) + by_hand(gradients[left:])


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 8, 13])
def test_one_process_adds_in_the_order_of_the_tree(micro_batches):
    model = nn.Linear(40, 1, bias=False)
    reduction = ExactReduction(model, DistributedContext.single(), micro_batches)
    gradients = [torch.randn(1, 40) * 10.0 ** (index % 4) for index in range(micro_batches)]
    for index, gradient in enumerate(gradients):
        with reduction.micro_batch(index):
            (model.weight * gradient).sum().backward()
    assert torch.equal(model.weight.grad, by_hand(gradients))
    in_a_row = sum(gradients[1:], gradients[0])
    assert micro_batches < 5 or not torch.equal(in_a_row, by_hand(gradients)), "so another order would show"


class Own(FastReduction):
    pass


def not_a_reduction(model: nn.Module, world: DistributedContext, micro_batches: int) -> nn.Module:
    return model


def test_a_class_of_the_user_s_own_is_taken_and_anything_else_is_refused():
    model, world = nn.Linear(2, 1), DistributedContext.single()
    assert isinstance(build_reduction(f"{__name__}:Own", model, world, micro_batches=2), Own)
    with pytest.raises(ConfigError, match=r"distributed\.reduction: .* returned a Linear, not a Reduction"):
        build_reduction(f"{__name__}:not_a_reduction", model, world, micro_batches=2)
