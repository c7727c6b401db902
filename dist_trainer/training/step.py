"""What goes into a step and what comes out of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.profiler import record_function

from dist_trainer.data.batch import Batch
from dist_trainer.distributed.collectives import gather_numbers, sum_exactly
from dist_trainer.distributed.context import DistributedContext

SUMMED_AT_ONCE = 1024


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
    losses: list[Tensor]
    """Sum of the token losses of each of this rank's micro-batches, in nats."""
    grad_norm: Tensor
    learning_rate: float
    target_tokens: int
    """Over all ranks."""
    target_tokens_so_far: int
    """Including those of all earlier steps."""

    @property
    def loss_sum(self) -> Tensor:
        """Sum of this rank's token losses, in nats."""
        return torch.stack(self.losses).sum()

    def mean_loss(self, world: DistributedContext) -> float:
        """Nats per target token over all ranks, summed exactly. For all ranks; waits for the device."""
        return sum_exactly(gather_numbers(torch.stack(self.losses), world)) / max(1, self.target_tokens)

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
    grad_norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm > 0:
        clip_grads_with_norm_(parameters, max_norm, grad_norm)
    return grad_norm


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements of `tensors`, a float32 scalar; it depends neither on threads nor on who has which rows.

    Rows' norms in float32, the sum of their squares in float64; each element of a vector is a row.
    """
    rows = [torch.linalg.vector_norm(t.flatten(1), dim=1) if t.dim() > 1 else t.abs().flatten() for t in tensors]
    if not rows:
        return torch.zeros(())
    squares = torch.cat(rows).double().square()
    while len(squares) > 1:  # torch divides the sum of a long vector among threads, but not one of this many elements
        squares = F.pad(squares, (0, -len(squares) % SUMMED_AT_ONCE)).view(-1, SUMMED_AT_ONCE).sum(dim=1)
    return squares.sqrt().squeeze().float()


def seed_dropout(seed: int, step: int, *, block: int) -> None:
    """Seed dropout for a micro-batch by its position in training, so that it does not depend on the rank that computes it."""
    key = hashlib.blake2b(f"{seed}/{step}/{block}".encode(), digest_size=8).digest()
    number = int.from_bytes(key, "little")
    # torch.manual_seed would also check for devices of all kinds, which takes a third of a millisecond.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)
