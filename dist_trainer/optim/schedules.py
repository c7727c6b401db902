"""`SCHEDULES`: the learning rate as a pure function of the step, so that there is no state to save or forget.

Each takes the number of finished steps and gives a factor of the peak learning rate. All of them warm up linearly:
step 0 runs at 1/warmup_steps, step warmup_steps at 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dist_trainer.config.registry import resolve
from dist_trainer.config.schema import DEFAULT_MAX_STEPS, ScheduleConfig, TrainConfig, TrainingConfig
from dist_trainer.errors import counted

log = logging.getLogger(__name__)

STABLE_PART = 0.8
"""Part of the run after which warmup-stable-decay decays."""
NOTICEABLE_CHANGE = 0.01
"""Of the learning rate, as a part of it."""


@dataclass(frozen=True)
class ScheduleSpec:
    """What a schedule stretches over."""

    warmup_steps: int
    total_steps: int
    min_lr_ratio: float
    """Factor at total_steps, where the schedule decays."""

    def warmup(self, step: int) -> float:
        """Rises to 1 over the warmup steps, then stays."""
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def progress(self, step: int, *, start: int) -> float:
        """0 at `start` to 1 at the last step's end."""
        return min(1.0, max(0.0, (step - start) / max(1, self.total_steps - start)))


def cosine(step: int, span: ScheduleSpec) -> float:
    """Half a cosine from 1 to min_lr_ratio after the warmup (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    wave = 0.5 * (1.0 + math.cos(math.pi * span.progress(step, start=span.warmup_steps)))
    return span.warmup(step) * (span.min_lr_ratio + (1.0 - span.min_lr_ratio) * wave)


def linear(step: int, span: ScheduleSpec) -> float:
    """A straight line from 1 to min_lr_ratio after the warmup."""
    return span.warmup(step) * (1.0 - (1.0 - span.min_lr_ratio) * span.progress(step, start=span.warmup_steps))


def constant(step: int, span: ScheduleSpec) -> float:
    """1 after the warmup."""
    return span.warmup(step)


def warmup_stable_decay(step: int, span: ScheduleSpec) -> float:
    """1 until 80 % of the run, then a straight line to min_lr_ratio (Hu et al. 2024, arXiv:2404.06395)."""
    start = max(span.warmup_steps, round(STABLE_PART * span.total_steps))
    return span.warmup(step) * (1.0 - (1.0 - span.min_lr_ratio) * span.progress(step, start=start))


SCHEDULES: dict[str, Callable[[int, ScheduleSpec], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": warmup_stable_decay,
}


def build_schedule(config: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    """The factor of the peak learning rate at each number of finished steps, over a run of `total_steps`."""
    schedule = resolve(SCHEDULES, config.name, "schedule.name")
    span = ScheduleSpec(config.warmup_steps, total_steps, config.min_lr_ratio)
    return lambda step: schedule(step, span)


def initial_learning_rate(group: dict[str, Any]) -> float | None:
    """The learning rate that a parameter group of an optimizer had before training, kept under `initial_lr` as by torch's
    schedulers; None for a group that has none (of an Adafactor that finds its own, for example).
    """
    return None if group.get("lr") is None else group.setdefault("initial_lr", float(group["lr"]))


def set_learning_rates(optimizer: Optimizer, factor: float) -> float:
    """Give each parameter group `factor` times its initial learning rate; returns the first group's, 0 if it has none."""
    # All are read before one is written: groups may share one tensor.
    initial_rates = [initial_learning_rate(group) for group in optimizer.param_groups]
    for group, initial in zip(optimizer.param_groups, initial_rates, strict=True):
        if initial is not None and isinstance(group["lr"], Tensor):
            group["lr"].fill_(initial * factor)
        elif initial is not None:
            group["lr"] = initial * factor
    return (initial_rates[0] or 0.0) * factor


def warn_of_unfinished_warmup(config: ScheduleConfig, total_steps: int) -> None:
    """Say it where the run ends before the peak. No refusal: trying a long run's config for a few steps is a good habit."""
    if config.warmup_steps > total_steps:
        log.warning(
            "schedule.warmup_steps: %d, but the run has %s: it ends before the learning rate has reached its peak",
            *(config.warmup_steps, counted(total_steps, "step")),
        )


def warn_of_changed_length(
    config: TrainingConfig, before: TrainConfig, *, step: int, steps_per_epoch: float, peak: float | None
) -> None:
    """Warn if a run that resumes after `step` steps has another learning rate from now on, because its length has changed.

    `before` is the run's `train` section when it stopped, `peak` the rate that the schedule's factor is applied to (None: the
    optimizer has none). Schedules are functions of the whole length, so a changed
    train.max_steps or train.epochs stretches or shrinks the curve, also the part that has been trained already.
    """
    most, most_before = total_steps(config.train, steps_per_epoch), total_steps(before, steps_per_epoch)
    if peak is None or not 0 < step < most or most == most_before:
        return
    now, then = (build_schedule(config.schedule, length) for length in (most, most_before))
    last, following = then(min(step, most_before) - 1), now(step)
    expected = then(min(step, most_before - 1))  # a schedule of the user's own may not be defined after its end
    if math.isclose(following, expected, rel_tol=NOTICEABLE_CHANGE):
        return
    log.warning(
        "the learning rate changes from %.3g at step %d to %.3g at step %d: the schedule (%s) now spans %s, it spanned "
        "%d (train.max_steps, train.epochs); see docs/resuming.md",
        *(peak * last, step, peak * following, step + 1, config.schedule.name, counted(most, "step"), most_before),
    )


def total_steps(config: TrainConfig, steps_per_epoch: float) -> int:
    """Optimizer steps of the whole run: train.max_steps or train.epochs, whichever ends first."""
    max_steps, epochs = config.max_steps, config.epochs
    if epochs is None:
        return DEFAULT_MAX_STEPS if max_steps is None else max_steps
    by_epochs = max(1, math.ceil(epochs * steps_per_epoch - 1e-9))
    return by_epochs if max_steps is None else min(max_steps, by_epochs)
