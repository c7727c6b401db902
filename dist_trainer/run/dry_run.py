"""`--dry_run`: everything up to the first step, then what a step takes. No run begins, and one that is going on is left alone.

The run's folder is only read: nothing is locked, written or moved there. Data are prepared for good, since that is what the
run itself would find in the cache.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_trainer.checkpoint.folders import step_folders
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.sampler import ValidationSampler
from dist_trainer.distributed.collectives import PendingSum, broadcast_object, gather_objects, run_and_share_errors
from dist_trainer.distributed.context import DistributedContext, init_distributed
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import EXIT_FINISHED, ConfigError, StoppedError, TrainingDivergedError, counted
from dist_trainer.parallel.registry import unwrap
from dist_trainer.run.build import assemble, build_with_fallback, check_visible_everywhere, refuse_what_cannot_run
from dist_trainer.run.folder import CHECKPOINTS
from dist_trainer.run.lifecycle import exit_code_when_preempted, has_finished_in_words
from dist_trainer.run.memory import explain_out_of_memory, snapshot_bytes, state_bytes, total_memory
from dist_trainer.run.resume import ResumeState, preview_resume
from dist_trainer.run.summary import run_header
from dist_trainer.tracking.formatting import aligned, duration, memory, quantity, significant
from dist_trainer.tracking.run_log import configure_logging
from dist_trainer.tracking.throughput import peak_memory_bytes
from dist_trainer.training.step import StepResult
from dist_trainer.training.trainer import Trainer
from dist_trainer.training.validation import evaluate, validation_is_due

log = logging.getLogger(__name__)

QUICK_STEP_SECONDS = 2.0
"""A first step shorter than this is followed by several, whose mean counts."""
QUICK_STEPS = 5


@dataclass(frozen=True)
class Cost:
    """What a run takes, over all ranks."""

    first_loss: float
    """In nats per target token, at the weights that the run begins with."""
    step_seconds: float
    validation_seconds: float
    """Of one validation on all its rows; 0: nothing is validated."""
    peak_bytes: list[int]
    """The most that each rank's device held, by rank."""
    steps: int
    """Steps that are left to do."""
    validations: int


def dry_run(config: TrainingConfig, *, stop_request: StopRequest | None = None) -> int:
    """Say what the run would be, and what it takes; the exit code. Raises DistTrainerError, the same one on every rank."""
    folder = config.run_folder
    with (
        init_distributed(config.distributed, stop_request=stop_request) as world,
        world.stop_request.listen(),
    ):
        configure_logging(None, rank=world.rank)
        refuse_what_cannot_run(config, world)
        run_and_share_errors(world, lambda: refuse_what_cannot_be_written(folder), acts=world.is_main)
        try:
            with explain_out_of_memory(config, world):
                trainer = prepare_beside(folder, config, world)
            if trainer.has_finished:
                log.info("dry run: %s", has_finished_in_words(trainer))
                return EXIT_FINISHED
            log.info("dry run of %s", run_header(trainer, folder, is_dry=True))
            with explain_out_of_memory(config, world, trainer):
                cost = rehearse(trainer)
        except StoppedError as stopped:
            log.warning("%s", stopped)
            return exit_code_when_preempted(world)
        finally:
            world.stop_request.mark_answered()
        if world.is_main:  # which has found the folder good
            log.info("%s", cost_in_words(cost, trainer, folder))
    return EXIT_FINISHED


def prepare_beside(folder: Path, config: TrainingConfig, world: DistributedContext) -> Trainer:
    """All parts of the run in `folder`, which may be going on and replace its checkpoints, and none of its files."""

    def build(start: ResumeState) -> Trainer:
        check_visible_everywhere(start, world)
        return assemble(config, world, None, start)

    return build_with_fallback(world, find=lambda: preview_resume(config, folder), build=build)


def refuse_what_cannot_be_written(folder: Path) -> None:
    """Raises ConfigError where the run could not make its folder, or write in it."""
    nearest = nearest_existing(folder)
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        why = "Permission denied" if nearest.is_dir() else "Not a directory"
        raise ConfigError(f"output_dir, run_name: {nearest} cannot be written ({why}); choose another --output_dir")


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest of those that it is to be in that is there, whatever it is."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))


def rehearse(trainer: Trainer) -> Cost:
    """Real steps on batches of the largest shape, and a part of a validation. The trainer is of no use after that.

    For all ranks; raises StoppedError between steps, and within one where there is but one rank, and TrainingDivergedError
    where the first loss or gradient is not finite.
    """
    world, steps, validations = trainer.world, *left_to_do(trainer)
    world.heartbeat.mark("warming up", step=trainer.progress.step)
    trainer.warm_up()
    micro_batches, target_tokens = largest_step(trainer)
    first, result = _seconds_of_steps(trainer, micro_batches, target_tokens, count=1)
    first_loss = result.mean_loss(world)
    refuse_first_step(trainer, first_loss, float(result.grad_norm))
    count = broadcast_object(1 if first > QUICK_STEP_SECONDS else QUICK_STEPS, world)
    seconds, _ = _seconds_of_steps(trainer, micro_batches, target_tokens, count=count)
    validation_seconds = _seconds_of_validation(trainer)
    return Cost(
        first_loss=first_loss,
        step_seconds=max(gather_objects(seconds, world)) / count,
        validation_seconds=max(gather_objects(validation_seconds, world)),
        peak_bytes=gather_objects(peak_memory_bytes(world.device), world),
        steps=steps,
        validations=validations,
    )


def refuse_first_step(trainer: Trainer, loss: float, grad_norm: float) -> None:
    """Raises TrainingDivergedError where loss or gradient would end the run; warns of a loss whose update would be skipped."""
    stops = trainer.divergence.policy == "stop"
    if math.isfinite(loss) and (math.isfinite(grad_norm) or not stops):
        return
    step, init_from = trainer.progress.step, trainer.config.model.init_from
    begins_with = f"the model of model.init_from ({init_from})" if init_from is not None and step <= 1 else "the weights"
    found = (
        f"dry run: step {step} has a loss of {loss} and a gradient norm of {grad_norm}, not finite; see that {begins_with} and "
        "the data are in order, or compute in another type (--precision.dtype fp32)"
    )
    if stops:
        raise TrainingDivergedError(found)
    log.warning("%s; its update, and those after it, would be skipped", found)


def left_to_do(trainer: Trainer) -> tuple[int, int]:
    """Steps, and validations."""
    steps = range(trainer.progress.step + 1, trainer.max_steps + 1)
    if trainer.validation_data is None:
        return len(steps), 0
    config, most, epoch_of = trainer.config.validation, trainer.max_steps, trainer.sampler.epoch_of
    return len(steps), sum(validation_is_due(config, step, max_steps=most, epoch_of=epoch_of) for step in steps)


def largest_step(trainer: Trainer) -> tuple[list[Batch], int]:
    """A step's micro-batches, each row as long as the longest may be, and their target tokens over all ranks."""
    trainer.sampler.seek(trainer.progress.step)
    batches, length = iter(trainer.train_data), trainer.config.data.sequence_length
    micro_batches = [next(batches).widened(length) for _ in range(trainer.accumulation_steps)]
    (target_tokens,) = PendingSum([sum(batch.num_targets() for batch in micro_batches)], trainer.world).wait()
    return [batch.to(trainer.world.device) for batch in micro_batches], target_tokens


def _seconds_of_steps(
    trainer: Trainer, micro_batches: list[Batch], target_tokens: int, *, count: int
) -> tuple[float, StepResult]:
    """Of so many steps on one and the same batch; and what the last of them left."""

    def step() -> StepResult:
        run_and_share_errors(trainer.world, lambda: None)  # a signal is heard here
        trainer.world.heartbeat.mark("training", step=trainer.progress.step)
        return trainer.train_step(micro_batches, target_tokens)

    began = time.perf_counter()
    results = [step() for _ in range(count)]
    _wait_for(trainer.world.device)
    return time.perf_counter() - began, results[-1]


def _seconds_of_validation(trainer: Trainer) -> float:
    """Of all blocks that a rank validates on, by the second time of the first."""
    if trainer.validation_data is None:
        return 0.0
    world, length = trainer.world, trainer.config.data.sequence_length
    sampler: ValidationSampler = trainer.validation_data.sampler  # type: ignore[assignment]
    first = [batch.widened(length) for batch in itertools.islice(trainer.validation_data, 1)]
    seconds = 0.0
    for _ in range(2):
        world.heartbeat.mark("validating", step=trainer.progress.step)
        result = evaluate(
            unwrap(trainer.model),
            first,
            num_blocks=sampler.num_blocks,
            world=world,
            precision=trainer.precision,
            loss_function=trainer.loss_function,
        )
        assert result is not None, "nothing interrupts it"
        seconds = result.seconds
    return seconds * -(-sampler.num_blocks // world.world_size)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------ in words


def cost_in_words(cost: Cost, trainer: Trainer, folder: Path) -> str:
    """Time, memory, and the disk."""
    disk = disk_of(trainer, folder)
    rows = {
        "time": time_in_words(cost, trainer),
        "memory": memory_in_words(cost, trainer),
        "disk": disk_in_words(disk),
    }
    problems = [] if math.isfinite(cost.first_loss) else ["the first loss is not finite"]
    problems += [] if disk.suffices else ["the disk has too little room for its checkpoints"]
    wrong = f"all works, but {' and '.join(problems)}" if problems else "nothing is wrong"
    return "\n".join([f"dry run: {wrong}; nothing was left in {folder}", *aligned(rows)])


def time_in_words(cost: Cost, trainer: Trainer) -> str:
    """How long a step takes, and how long the run will."""
    tokens = trainer.config.batch.global_batch_size * trainer.config.data.sequence_length
    work = counted(cost.steps, "step")
    if cost.validations:
        work += f" and {counted(cost.validations, 'validation')} of {duration(cost.validation_seconds)}"
    total = cost.steps * cost.step_seconds + cost.validations * cost.validation_seconds
    return (
        f"{significant(cost.step_seconds, 3)} s a step ({quantity(tokens / cost.step_seconds)} tokens/s): "
        f"{work} take about {duration(total)}, without compiling, samples and saving"
    )


def memory_in_words(cost: Cost, trainer: Trainer) -> str:
    """The most that a rank had in use; where ranks differ, also the least."""
    most, least, device = max(cost.peak_bytes), min(cost.peak_bytes), trainer.world.device
    total = total_memory(device)
    ranks = f" on rank {cost.peak_bytes.index(most)}, {memory(least)} at least" if most > least else ""
    if device.type == "cuda":
        pinned = f"saves pin {memory(snapshot_bytes(trainer))} of host memory on rank 0"
        return f"at most {memory(most)} ({most / total:.0%}) of a GPU's {memory(total)}{ranks}; {pinned}"
    processes = f"; {len(cost.peak_bytes)} processes" if len(cost.peak_bytes) > 1 else ""
    return f"at most {memory(most)} of the machine's {memory(total)} in a process{ranks}{processes}"


@dataclass(frozen=True)
class Disk:
    """What checkpoints need, in bytes."""

    checkpoint: int
    kept: int
    """Checkpoints at a time."""
    present: int
    """Of them there already."""
    free: int

    @property
    def suffices(self) -> bool:
        """Whether those that are to come have room."""
        return (self.kept - min(self.kept, self.present)) * self.checkpoint <= self.free


def disk_of(trainer: Trainer, folder: Path) -> Disk:
    """A checkpoint has weights and the optimizer's state; beside the newest ones the best is kept, and one is being made."""
    state = state_bytes(trainer)
    return Disk(
        checkpoint=state["weights"] + state["optimizer"],
        kept=trainer.config.checkpoint.keep_last + 2,
        present=len(step_folders(folder / CHECKPOINTS)),
        free=shutil.disk_usage(nearest_existing(folder)).free,
    )


def disk_in_words(disk: Disk) -> str:
    """How much of it checkpoints take."""
    present = f", {disk.present} of them there" if disk.present else ""
    most = f"at most {disk.kept} at a time{present}: {memory(disk.kept * disk.checkpoint)}"
    return f"{memory(disk.checkpoint)} a checkpoint, {most}; {memory(disk.free)} are free"
