"""Validation loss over all ranks: every row exactly once, weighted by tokens, the same number on any number of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_trainer.config.schema import ValidationConfig
from dist_trainer.data.batch import Batch
from dist_trainer.distributed.collectives import all_reduce_sum
from dist_trainer.distributed.world import World
from dist_trainer.precision import Precision

LossFunction = Callable[[nn.Module, Any], Tensor]
"""Sum of the token losses of a batch: float32 scalar."""


@dataclass(frozen=True)
class ValidationResult:
    """What validation found."""

    loss: float
    """Nats per target token."""
    tokens: int
    """Target tokens it was measured on."""
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that overflows."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def validation_is_due(config: ValidationConfig, step: int, *, max_steps: int, epoch_of: Callable[[int], float]) -> bool:
    """Whether a validation follows `step`: by steps, by epochs, and always at the last one or past it."""
    by_steps = config.every_steps > 0 and step % config.every_steps == 0
    by_epochs = config.every_epochs > 0 and (epoch_of(step) // config.every_epochs > epoch_of(step - 1) // config.every_epochs)
    return step > 0 and (by_steps or by_epochs or step >= max_steps)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_blocks: int,
    world: World,
    precision: Precision,
    loss_function: LossFunction,
    interrupted: Callable[[], bool] = lambda: False,
) -> ValidationResult | None:
    """Validation loss of `model` (the module itself, not its data-parallel wrapper) on `batches`.

    `batches` are this rank's blocks of rows: block i of this rank is block `rank + i * world_size` of `num_blocks`. Losses
    are kept by block and added up in one fixed, exactly rounded order, so the sum depends neither on the number of ranks
    nor on who computed what. None, on all ranks, where `interrupted` cut it short on one of them.
    """
    started = time.perf_counter()
    losses = torch.zeros(num_blocks, dtype=torch.float64, device=world.device)
    target_tokens, cut_short = 0, False
    was_training = model.training
    model.eval()
    for index, batch in enumerate(batches):
        if cut_short := interrupted():
            break
        target_tokens += batch.num_targets()
        with precision.autocast():
            losses[world.rank + index * world.world_size] = loss_function(model, batch.to(world.device))
    model.train(was_training)

    # Other ranks' blocks are exact zeros here, so the reduction only collects.
    facts = torch.tensor([target_tokens, int(cut_short)], dtype=torch.float64, device=world.device)
    block_losses = all_reduce_sum(torch.cat([losses, facts]), world).tolist()
    *block_losses, all_target_tokens, ranks_cut_short = block_losses
    if ranks_cut_short:
        return None
    loss = math.fsum(block_losses) / max(1, int(all_target_tokens))
    return ValidationResult(loss, int(all_target_tokens), time.perf_counter() - started)
