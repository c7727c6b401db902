"""Skips updates with NaN or infinity in losses or gradients, on all ranks, without waiting for the device.

A non-finite loss on one rank makes its gradients NaN, and the exchange spreads them to all ranks. The norm of the exchanged
gradients is the same on all ranks, so all skip an update or none does.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_trainer.errors import TrainingDivergedError, counted
from dist_trainer.training.step import StepResult


def nan_unless_finite(loss: Tensor, factor: float, *, on_host: bool) -> float | Tensor:
    """`factor`, or NaN if `loss` is not finite; a tensor unless the loss is in host memory (`on_host`)."""
    if on_host:
        return factor if math.isfinite(loss.item()) else math.nan
    return (loss.detach().float() * 0.0).add_(factor)


def step_if_finite(optimizer: Optimizer, grad_norm: Tensor, *, on_host: bool) -> None:
    """Update the weights unless `grad_norm` is not finite. Does not wait for the device if the optimizer can skip on the device
    itself (torch's fused ones), by the protocol between GradScaler and these, without a scale.
    """
    if not on_host and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (~grad_norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    elif math.isfinite(grad_norm.item()):
        optimizer.step()


class DivergenceWatch:
    """Counts skipped updates, and ends the run if necessary. Reads each step's gradient norm: immediately on a CPU; one step
    later on a GPU, when it has been computed.
    """

    def __init__(self, policy: Literal["stop", "skip"], *, max_skipped_steps: int, device: torch.device) -> None:
        self.policy = policy
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        """Skipped updates so far."""
        self.skipped_in_a_row = 0
        """Consecutive skipped updates up to now."""
        self.diverged_at: StepResult | None = None
        """The step that ended the run."""
        self._pending: tuple[StepResult, Tensor, torch.cuda.Event | None] | None = None
        self._on_gpu = device.type == "cuda"

    def observe(self, result: StepResult) -> None:
        """Take the gradient norm of `result`, and check the norms that have been read.

        Raises TrainingDivergedError if the policy is to stop, or too many consecutive updates were skipped.
        """
        if self._on_gpu:
            norm = result.grad_norm
            on_host = torch.empty_like(norm, device="cpu", pin_memory=True).copy_(norm, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            earlier, self._pending = self._pending, (result, on_host, copied)
            self._judge(earlier)
        else:
            self._judge((result, result.grad_norm, None))

    def drain(self) -> None:
        """Check the last step too; before a checkpoint, and at the end."""
        earlier, self._pending = self._pending, None
        self._judge(earlier)

    def _judge(self, seen: tuple[StepResult, Tensor, torch.cuda.Event | None] | None) -> None:
        if seen is None:
            return
        result, grad_norm, copied = seen
        step = result.step
        if copied is not None:
            copied.synchronize()
        norm = grad_norm.item()  # in host memory
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.policy == "skip" and self.skipped_in_a_row <= self.max_skipped_steps:
            return
        self.diverged_at = result
        if self.policy == "stop":
            raise TrainingDivergedError(
                f"step {step}: the loss or its gradients are not finite (gradient norm {norm}); the weights were not "
                "updated. Lower optim.learning_rate, or set --train.on_non_finite skip"
            )
        raise TrainingDivergedError(
            f"step {step}: gradients were not finite {counted(self.skipped_in_a_row, 'step')} in a row "
            f"(train.max_skipped_steps is {self.max_skipped_steps})"
        )
