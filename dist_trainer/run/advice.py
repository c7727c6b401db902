"""Warnings about a run whose settings are allowed but rarely what a user wants."""

from __future__ import annotations

import logging
import math

from torch import nn

from dist_trainer.config.schema import OptimConfig, ScheduleConfig, TrainConfig, TrainingConfig
from dist_trainer.errors import counted
from dist_trainer.models.registry import is_pretrained
from dist_trainer.optim.schedules import build_schedule, initial_learning_rate, total_steps
from dist_trainer.parallel.registry import unwrap
from dist_trainer.run.resume import ResumeState, log_world_size_change
from dist_trainer.training.precision import warn_of_emulated_bf16
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)

LARGE_MODEL = 50_000_000
"""Parameters."""
NOTICEABLE_CHANGE = 0.01
"""Of the learning rate, relative to it."""


def warn_of_settings(config: TrainingConfig, trainer: Trainer, start: ResumeState) -> None:
    """All warnings of this file, and what changes if the number of ranks has changed."""
    world, model = trainer.world, unwrap(trainer.model)
    warn_of_unfinished_warmup(config.schedule, trainer.max_steps)
    warn_of_emulated_bf16(trainer.precision, world.device)
    if start.train_before is not None:
        warn_of_changed_length(
            config.schedule,
            config.train,
            start.train_before,
            step=start.progress.step,
            steps_per_epoch=trainer.sampler.steps_per_epoch,
            peak=initial_learning_rate(trainer.optimizer.param_groups[0]),
        )
    if start.checkpoint is None and config.model.init_from is not None and is_pretrained(config.model):
        parameters = sum(parameter.numel() for parameter in trainer.parameters)
        warn_of_default_learning_rate(config.optim, parameters=parameters, init_from=config.model.init_from)
    drops_out = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    masks_depend_on_ranks = drops_out and config.batch.micro_batch_size is None
    log_world_size_change(start, world.world_size, masks_depend_on_ranks=masks_depend_on_ranks)


def warn_of_default_learning_rate(config: OptimConfig, *, parameters: int, init_from: str) -> None:
    """Warn if a pretrained model is trained with the default learning rate, which is for random weights.

    2e-5 is usual for models of 0.1 to 10 billion parameters; for smaller models a tenth of the default is suggested.
    """
    if config.learning_rate == OptimConfig.learning_rate:
        log.warning(
            "optim.learning_rate: %g is the default, meant for small models with random weights; for the pretrained model "
            "%s try %s (docs/fine_tuning.md)",
            *(config.learning_rate, init_from, "2e-5" if parameters >= LARGE_MODEL else f"{config.learning_rate / 10:g}"),
        )


def warn_of_unfinished_warmup(config: ScheduleConfig, total_steps: int) -> None:
    """Warn if the run ends during the warmup. Not an error: trying a long run's config for a few steps is a good habit."""
    if config.warmup_steps > total_steps:
        log.warning(
            "schedule.warmup_steps: %d, but the run has %s: it ends before the learning rate has reached its peak",
            *(config.warmup_steps, counted(total_steps, "step")),
        )


def warn_of_changed_length(
    schedule: ScheduleConfig,
    train: TrainConfig,
    train_before: TrainConfig,
    *,
    step: int,
    steps_per_epoch: float,
    peak: float | None,
) -> None:
    """Warn if a run that resumes after `step` steps continues at another learning rate because its length has changed.

    `train_before` is the run's `train` section when it stopped, `peak` the rate that the schedule's factor is applied to (None:
    the optimizer has none). A schedule is a function of the run's length, so a changed train.max_steps or train.epochs
    stretches or shrinks the curve, including the part that has been trained already.
    """
    steps, steps_before = total_steps(train, steps_per_epoch), total_steps(train_before, steps_per_epoch)
    if peak is None or not 0 < step < steps or steps == steps_before:
        return
    factor, factor_before = (build_schedule(schedule, length) for length in (steps, steps_before))
    last, following = factor_before(min(step, steps_before) - 1), factor(step)
    expected = factor_before(min(step, steps_before - 1))  # a user's schedule may not be defined beyond its end
    if math.isclose(following, expected, rel_tol=NOTICEABLE_CHANGE):
        return
    log.warning(
        "the learning rate changes from %.3g at step %d to %.3g at step %d: the schedule (%s) now spans %s, it spanned "
        "%d (train.max_steps, train.epochs); see docs/resuming.md",
        *(peak * last, step, peak * following, step + 1, schedule.name, counted(steps, "step"), steps_before),
    )
