"""Notices updates that were skipped because their gradients were not finite, without making the device wait."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dist_trainer.errors import TrainingDivergedError, counted
from dist_trainer.training.step import StepResult


class DivergenceWatch:
    """Reads each step's gradient norm: at once on CPU, one step later on a GPU, which by then has long computed it.

    The norm is the same number on every rank, since it is taken of exchanged gradients: so is what follows from it.
    """

    def __init__(self, policy: Literal["stop", "skip"], *, max_skipped_steps: int, device: torch.device) -> None:
        self.policy = policy
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        """Skipped updates so far."""
        self.skipped_in_a_row = 0
        """Of these, the last ones without a good one between them."""
        self.diverged_at: StepResult | None = None
        """The step that ended the run."""
        self._pending: tuple[StepResult, Tensor, torch.cuda.Event | None] | None = None
        self._on_gpu = device.type == "cuda"

    def observe(self, result: StepResult) -> None:
        """Note the gradient norm of `result`, and judge what is known by now.

        Raises TrainingDivergedError where the policy is to stop, or too many updates in a row were skipped.
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
        """Judge what is still on its way; before a checkpoint is taken and at the end."""
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
        if self.policy == "stop" or self.skipped_in_a_row > self.max_skipped_steps:
            self.diverged_at = result
        if self.policy == "stop":
            raise TrainingDivergedError(
                f"step {step}: the loss or its gradients are not finite (gradient norm {norm}); the weights were left as "
                "they were. Lower optim.learning_rate, or set --train.on_non_finite skip"
            )
        if self.skipped_in_a_row > self.max_skipped_steps:
            raise TrainingDivergedError(
                f"step {step}: gradients were not finite {counted(self.skipped_in_a_row, 'step')} in a row "
                f"(train.max_skipped_steps is {self.max_skipped_steps})"
            )
