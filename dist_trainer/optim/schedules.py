"""`SCHEDULES`: the learning rate as a pure function of the step, so there is no state to save.

Each schedule takes the number of finished steps and returns a factor of the peak learning rate. All of them warm up linearly:
step 0 runs at 1/warmup_steps, step warmup_steps at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dist_trainer.config.registry import resolve
from dist_trainer.config.schema import DEFAULT_MAX_STEPS, ScheduleConfig, TrainConfig

STABLE_PART = 0.8
"""Part of the run after which warmup-stable-decay decays."""


@dataclass(frozen=True)
class ScheduleSpec:
    """The numbers that define a schedule's curve."""

    warmup_steps: int
    total_steps: int
    min_lr_ratio: float
    """Factor at total_steps, for schedules that decay."""

    def warmup(self, step: int) -> float:
        """Rises to 1 over the warmup steps, then stays there."""
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def progress(self, step: int, *, start: int) -> float:
        """0 at `start`, 1 at total_steps."""
        return min(1.0, max(0.0, (step - start) / max(1, self.total_steps - start)))


def cosine(step: int, spec: ScheduleSpec) -> float:
    """Half a cosine from 1 to min_lr_ratio after the warmup (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    wave = 0.5 * (1.0 + math.cos(math.pi * spec.progress(step, start=spec.warmup_steps)))
    return spec.warmup(step) * (spec.min_lr_ratio + (1.0 - spec.min_lr_ratio) * wave)


def linear(step: int, spec: ScheduleSpec) -> float:
    """A straight line from 1 to min_lr_ratio after the warmup."""
    return spec.warmup(step) * (1.0 - (1.0 - spec.min_lr_ratio) * spec.progress(step, start=spec.warmup_steps))


def constant(step: int, spec: ScheduleSpec) -> float:
    """1 after the warmup."""
    return spec.warmup(step)


def warmup_stable_decay(step: int, spec: ScheduleSpec) -> float:
    """1 for the first 80 % of the run, then a straight line to min_lr_ratio (Hu et al. 2024, arXiv:2404.06395)."""
    start = max(spec.warmup_steps, round(STABLE_PART * spec.total_steps))
    return spec.warmup(step) * (1.0 - (1.0 - spec.min_lr_ratio) * spec.progress(step, start=start))


SCHEDULES: dict[str, Callable[[int, ScheduleSpec], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": warmup_stable_decay,
}


def build_schedule(config: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    """A function from the number of finished steps to the factor of the peak learning rate, for a run of `total_steps`."""
    schedule = resolve(SCHEDULES, config.name, "schedule.name")
    spec = ScheduleSpec(config.warmup_steps, total_steps, config.min_lr_ratio)
    return lambda step: schedule(step, spec)


def total_steps(config: TrainConfig, steps_per_epoch: float) -> int:
    """Optimizer steps of the run: train.max_steps or train.epochs, whichever ends first."""
    max_steps, epochs = config.max_steps, config.epochs
    if epochs is None:
        return DEFAULT_MAX_STEPS if max_steps is None else max_steps
    by_epochs = max(1, math.ceil(epochs * steps_per_epoch - 1e-9))
    return by_epochs if max_steps is None else min(max_steps, by_epochs)


def initial_learning_rate(group: dict[str, Any]) -> float | None:
    """A parameter group's learning rate before training, kept under `initial_lr` as torch's schedulers do.

    None for a group without one, such as that of an Adafactor that chooses its own.
    """
    return None if group.get("lr") is None else group.setdefault("initial_lr", float(group["lr"]))


def set_learning_rates(optimizer: Optimizer, factor: float) -> float:
    """Set each parameter group to `factor` times its initial learning rate; returns the first group's, 0 if it has none."""
    # All are read before any is written: groups may share one tensor.
    initial_rates = [initial_learning_rate(group) for group in optimizer.param_groups]
    for group, initial in zip(optimizer.param_groups, initial_rates, strict=True):
        if initial is not None and isinstance(group["lr"], Tensor):
            group["lr"].fill_(initial * factor)
        elif initial is not None:
            group["lr"] = initial * factor
    return (initial_rates[0] or 0.0) * factor
