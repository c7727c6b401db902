"""What goes into a step and what comes out of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.profiler import record_function

from dist_trainer.data.batch import Batch
from dist_trainer.distributed.collectives import all_reduce_sum
from dist_trainer.distributed.context import DistributedContext


@dataclass(frozen=True)
class StepInput:
    """This rank's share of a step, read ahead of it."""

    micro_batches: list[Batch]
    target_tokens: int
    """In these micro-batches."""


@dataclass(frozen=True)
class StepResult:
    """What a step returns; its tensors stay on the device until they are read."""

    step: int
    loss_sum: Tensor
    """Sum of this rank's token losses, in nats; with one micro-batch it may be the tensor that the loss function returned."""
    grad_norm: Tensor
    learning_rate: float
    target_tokens: int
    """Over all ranks."""
    target_tokens_so_far: int
    """Including those of all earlier steps."""

    def mean_loss(self, world: DistributedContext) -> float:
        """Nats per target token over all ranks. For all ranks; waits for the device."""
        return float(all_reduce_sum(self.loss_sum.clone(), world)) / max(1, self.target_tokens)

    def metrics(self, world: DistributedContext) -> dict[str, float | int | bool]:
        """Metrics by their names in metrics.jsonl. For all ranks; waits for the device."""
        grad_norm = float(self.grad_norm)
        return {
            "step": self.step,
            "loss": self.mean_loss(world),
            "lr": self.learning_rate,
            "grad_norm": grad_norm,
            "skipped": not math.isfinite(grad_norm),
            "tokens": self.target_tokens_so_far,
        }


def trace_range(name: str) -> AbstractContextManager[Any]:
    """A named range in the profiler's trace, while it records (profile.steps)."""
    return record_function(name) if is_profiling() else nullcontext()


def is_profiling() -> bool:
    """Whether torch's profiler is recording. There is no public API; an unrecorded range costs microseconds."""
    is_enabled = getattr(torch.autograd, "_profiler_enabled", None)
    return is_enabled is None or is_enabled()


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a norm of `max_norm` (0: never); returns the norm before, a float32 scalar."""
    grad_norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm > 0:
        clip_grads_with_norm_(parameters, max_norm, grad_norm)
    return grad_norm.float()


def seed_dropout(seed: int, step: int, *, block: int) -> None:
    """Seed dropout for a micro-batch by its position in training, so that it does not depend on the rank that computes it."""
    key = hashlib.blake2b(f"{seed}/{step}/{block}".encode(), digest_size=8).digest()
    number = int.from_bytes(key, "little")
    # torch.manual_seed would also check for devices of all kinds, which takes a third of a millisecond.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)
