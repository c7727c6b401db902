"""Before the first step: what would otherwise happen in it, and must not."""

from __future__ import annotations

from torch import nn
from torch.utils.data import DataLoader

from dist_trainer.distributed.collectives import agree
from dist_trainer.distributed.world import World
from dist_trainer.evaluation import LossFunction
from dist_trainer.parallel.registry import gradient_sync
from dist_trainer.precision import Precision
from dist_trainer.step import seed_dropout


def warm_up(
    model: nn.Module,
    train_data: DataLoader,
    world: World,
    precision: Precision,
    loss_function: LossFunction,
    *,
    compiles: bool,
) -> None:
    """Compile where a signal can break it off, and bring DDP into the state it has in a run that never stopped.

    Leaves gradients of zero. Raises StoppedError. DDP sorts its buckets by the order in which gradients came in its first
    backward pass; with more than two ranks that changes the order of summation, hence the last bits, of just the first step
    after a resume.
    """

    def rehearse(*, exchange: bool, shorter_by: int = 0) -> None:
        batch = next(iter(train_data)).to(world.device)
        if shorter_by:
            batch = batch.shortened(shorter_by)
        seed_dropout(0, 0, block=0)
        with gradient_sync(model, enabled=exchange):
            with precision.autocast():
                loss = loss_function(model, batch)
            (loss * 0.0).backward()
        model.zero_grad(set_to_none=True)

    if compiles:
        agree(world, lambda: rehearse(exchange=False))
        if getattr(train_data.dataset, "varies_in_length", False):
            agree(world, lambda: rehearse(exchange=False, shorter_by=1))  # another length, so that any is compiled for
    if world.world_size > 2:
        rehearse(exchange=True)
