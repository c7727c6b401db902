"""What goes into a step and what comes out of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.profiler import record_function

from dist_trainer.data.batch import Batch, DeviceCopy
from dist_trainer.distributed.collectives import all_reduce_sum
from dist_trainer.distributed.context import DistributedContext


@dataclass(frozen=True)
class StepInput:
    """One step's share of this rank, fetched ahead."""

    micro_batches: list[Batch]
    target_tokens: int
    """In these micro-batches."""


@dataclass(frozen=True)
class StepResult:
    """What a step gives; its tensors stay on the device until they are read."""

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
        """By their names in metrics.jsonl. For all ranks; waits for the device."""
        grad_norm = float(self.grad_norm)
        return {
            "step": self.step,
            "loss": self.mean_loss(world),
            "lr": self.learning_rate,
            "grad_norm": grad_norm,
            "skipped": not math.isfinite(grad_norm),
            "tokens": self.target_tokens_so_far,
        }


def phase(name: str) -> AbstractContextManager[Any]:
    """A range of this name in the trace of steps that are being recorded (profile.steps)."""
    return record_function(name) if is_profiling() else nullcontext()


def is_profiling() -> bool:
    """Whether torch's profiler records; asked without a public API, as a range costs some microseconds even if it does not."""
    is_enabled = getattr(torch.autograd, "_profiler_enabled", None)
    return is_enabled is None or is_enabled()


def fetch_step(
    batches: Iterator[Batch], accumulation_steps: int, device_copy: DeviceCopy, on_batch: Callable[[], None]
) -> StepInput:
    """The next step's micro-batches, on their way to the device; `on_batch` is called before each is read."""
    fetched = []
    while len(fetched) < accumulation_steps:
        on_batch()
        fetched.append(next(batches))
    return StepInput(device_copy.start(fetched), sum(batch.num_targets() for batch in fetched))


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to `max_norm` (0: never); their norm before, over all parameters: a float32 scalar."""
    grad_norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm > 0:
        clip_grads_with_norm_(parameters, max_norm, grad_norm)
    return grad_norm.float()


def seed_dropout(seed: int, step: int, *, block: int) -> None:
    """Make the random numbers of a micro-batch depend on its place in training, not on the rank that computes it."""
    key = hashlib.blake2b(f"{seed}/{step}/{block}".encode(), digest_size=8).digest()
    number = int.from_bytes(key, "little")
    # torch.manual_seed does the same, and looks for devices of all kinds: a third of a millisecond each time.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)
