"""`--dry_run`: starts up like a run, tries the largest batch, and reports what a run will need. No run is started or disturbed.

The run's folder is only read: nothing is locked, written or moved there. Prepared data stay in the cache for the real run.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from pathlib import Path

import torch

from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.sampler import ValidationSampler
from dist_trainer.distributed.collectives import PendingSum, broadcast_object, gather_objects, run_and_share_errors
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import EXIT_FINISHED, ConfigError, TrainingDivergedError
from dist_trainer.run.build import build_trainer
from dist_trainer.run.lifecycle import build_where_found, format_finished, on_all_ranks
from dist_trainer.run.memory import explain_out_of_memory
from dist_trainer.run.resume import preview_resume
from dist_trainer.run.summary import Cost, format_cost, format_header, nearest_existing
from dist_trainer.tracking.throughput import peak_memory_bytes
from dist_trainer.training.precompile import precompile
from dist_trainer.training.step import StepResult
from dist_trainer.training.trainer import Trainer
from dist_trainer.training.validation import evaluate, validation_is_due

log = logging.getLogger(__name__)

QUICK_STEP_SECONDS = 2.0
"""If the first step is shorter than this, the mean of several more is measured."""
QUICK_STEPS = 5


def dry_run(config: TrainingConfig, *, stop_request: StopRequest | None = None) -> int:
    """Print what the run will do and need; the exit code. Raises DistTrainerError, the same one on every rank."""
    return on_all_ranks(lambda world: _dry_run(config, world), config, stop_request=stop_request)


def _dry_run(config: TrainingConfig, world: DistributedContext) -> int:
    folder = config.run_folder
    run_and_share_errors(world, lambda: check_writable(folder), acts=world.is_main)
    with explain_out_of_memory(config, world):
        trainer = build_without_folder(config, world)
    if trainer.has_finished:
        log.info("dry run: %s", format_finished(trainer))
        return EXIT_FINISHED
    log.info("%s", format_header(trainer, folder, is_dry=True))
    with explain_out_of_memory(config, world, trainer):
        cost = measure(trainer)
    if world.is_main:  # only this rank has checked the folder
        log.info("%s", format_cost(cost, trainer, folder))
    return EXIT_FINISHED


def build_without_folder(config: TrainingConfig, world: DistributedContext) -> Trainer:
    """All parts of the run except those that write to its folder: another job may be training there and replace checkpoints."""
    return build_where_found(
        world,
        find=lambda: preview_resume(config, config.run_folder),
        build=lambda start: build_trainer(config, world, start),
    )


def check_writable(folder: Path) -> None:
    """Raises ConfigError if the run could not create its folder or write to it."""
    nearest = nearest_existing(folder)
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        why = "Permission denied" if nearest.is_dir() else "Not a directory"
        raise ConfigError(f"output_dir, run_name: {nearest} cannot be written ({why}); choose another --output_dir")


def measure(trainer: Trainer) -> Cost:
    """Take real steps on batches of the largest shape, and run part of a validation. The trainer cannot be used afterwards.

    For all ranks; raises StoppedError between steps (with a single rank, also within one), and TrainingDivergedError if the
    first loss or gradient is not finite.
    """
    world, (steps, validations) = trainer.world, left_to_do(trainer)
    world.heartbeat.mark("warming up", step=trainer.progress.step)
    precompile(trainer)
    micro_batches, target_tokens = largest_step(trainer)
    first, result = _time_steps(trainer, micro_batches, target_tokens, count=1)
    first_loss = result.mean_loss(world)
    check_first_step(trainer, first_loss, float(result.grad_norm))
    count = broadcast_object(1 if first > QUICK_STEP_SECONDS else QUICK_STEPS, world)
    seconds, _ = _time_steps(trainer, micro_batches, target_tokens, count=count)
    validation_seconds = _time_validation(trainer)
    return Cost(
        first_loss=first_loss,
        step_seconds=max(gather_objects(seconds, world)) / count,
        validation_seconds=max(gather_objects(validation_seconds, world)),
        peak_bytes=gather_objects(peak_memory_bytes(world.device), world),
        steps=steps,
        validations=validations,
    )


def check_first_step(trainer: Trainer, loss: float, grad_norm: float) -> None:
    """Raises TrainingDivergedError if this loss or gradient would end the run; warns if its update would be skipped."""
    stops = trainer.divergence.policy == "stop"
    if math.isfinite(loss) and (math.isfinite(grad_norm) or not stops):
        return
    step, init_from = trainer.progress.step, trainer.config.model.init_from
    weights = f"the model of model.init_from ({init_from})" if init_from is not None and step <= 1 else "the weights"
    message = (
        f"dry run: step {step} has a loss of {loss} and a gradient norm of {grad_norm}; check {weights} and the data, "
        "or use another precision (--precision.dtype fp32)"
    )
    if stops:
        raise TrainingDivergedError(message)
    log.warning("%s; this update and the following ones would be skipped", message)


def left_to_do(trainer: Trainer) -> tuple[int, int]:
    """The number of steps and of validations left."""
    steps = range(trainer.progress.step + 1, trainer.max_steps + 1)
    if trainer.validation_data is None:
        return len(steps), 0
    config, last, epoch_of = trainer.config.validation, trainer.max_steps, trainer.sampler.epoch_of
    return len(steps), sum(validation_is_due(config, step, max_steps=last, epoch_of=epoch_of) for step in steps)


def largest_step(trainer: Trainer) -> tuple[list[Batch], int]:
    """A step's micro-batches, each sequence at its maximum length, and their target tokens over all ranks."""
    trainer.sampler.seek(trainer.progress.step)
    batches, length = iter(trainer.train_data), trainer.config.data.sequence_length
    micro_batches = [next(batches).widened(length) for _ in range(trainer.accumulation_steps)]
    (target_tokens,) = PendingSum([sum(batch.num_targets() for batch in micro_batches)], trainer.world).wait()
    return [batch.to(trainer.world.device) for batch in micro_batches], target_tokens


def _time_steps(trainer: Trainer, micro_batches: list[Batch], target_tokens: int, *, count: int) -> tuple[float, StepResult]:
    """Seconds for `count` steps on the same batch, and the result of the last one."""

    def step() -> StepResult:
        run_and_share_errors(trainer.world, lambda: None)  # raises StoppedError after a signal
        trainer.world.heartbeat.mark("training", step=trainer.progress.step)
        return trainer.train_step(micro_batches, target_tokens)

    started = time.perf_counter()
    results = [step() for _ in range(count)]
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize(trainer.world.device)
    return time.perf_counter() - started, results[-1]


def _time_validation(trainer: Trainer) -> float:
    """Seconds for a complete validation on this rank, estimated from the second pass over its first block."""
    if trainer.validation_data is None:
        return 0.0
    world, length = trainer.world, trainer.config.data.sequence_length
    sampler: ValidationSampler = trainer.validation_data.sampler  # type: ignore[assignment]
    first = [batch.widened(length) for batch in itertools.islice(trainer.validation_data, 1)]
    seconds = 0.0
    for _ in range(2):
        with trainer.evaluating() as model:
            result = evaluate(
                model,
                first,
                num_blocks=sampler.num_blocks,
                world=world,
                precision=trainer.precision,
                loss_function=trainer.loss_function,
            )
        assert result is not None, "nothing interrupts it"
        seconds = result.seconds
    return seconds * -(-sampler.num_blocks // world.world_size)
