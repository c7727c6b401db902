"""Steps whose gradients are NaN or infinite: how many are skipped, and when the run ends."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from dist_trainer.errors import TrainingDivergedError
from dist_trainer.training.nonfinite import DivergenceWatch
from dist_trainer.training.step import StepResult


def watch(policy: Literal["stop", "skip"], max_skipped_steps: int = 2) -> DivergenceWatch:
    return DivergenceWatch(policy, max_skipped_steps=max_skipped_steps, device=torch.device("cpu"))


def step(number: int, grad_norm: float) -> StepResult:
    return StepResult(number, torch.tensor(1.0), torch.tensor(grad_norm), 0.1, 8, 8 * number)


def test_a_finite_step_resets_the_count_of_consecutive_skips():
    watched = watch("skip")
    for number, grad_norm in enumerate([math.nan, math.inf, 1.0, math.nan, math.nan, 1.0], start=1):
        watched.observe(step(number, grad_norm))
    assert (watched.skipped_steps, watched.skipped_in_a_row, watched.diverged_at) == (4, 0, None)


def test_one_consecutive_skipped_step_too_many_ends_the_run():
    watched = watch("skip")
    watched.observe(step(1, math.nan))
    watched.observe(step(2, math.nan))
    with pytest.raises(TrainingDivergedError, match=r"^step 3: .* 3 steps"):
        watched.observe(step(3, math.nan))
    assert watched.diverged_at is not None
    assert watched.diverged_at.step == 3


def test_the_policy_stop_ends_the_run_at_the_first_one():
    watched = watch("stop")
    watched.observe(step(1, 1.0))
    with pytest.raises(TrainingDivergedError, match=r"^step 2: .*learning_rate"):
        watched.observe(step(2, math.inf))


def test_torch_s_fused_optimizers_still_skip_on_the_device():
    """By an attribute that is private to torch: without it each step would wait for the GPU."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], fused=True)
    assert optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
