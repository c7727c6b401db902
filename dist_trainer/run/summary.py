"""What a run is going to do, and warnings about its settings, before its first step; and what a dry run has measured."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_trainer.checkpoint.folders import step_folders
from dist_trainer.config.paths import CHECKPOINTS
from dist_trainer.config.schema import OptimConfig, ScheduleConfig, TrainConfig, TrainingConfig
from dist_trainer.data.loader import varies_in_length
from dist_trainer.distributed.machine import device_name
from dist_trainer.errors import counted
from dist_trainer.models.registry import is_pretrained
from dist_trainer.optim.muon import MuonWithAdamW
from dist_trainer.optim.schedules import build_schedule, initial_learning_rate, total_steps
from dist_trainer.parallel.compile import is_compiled
from dist_trainer.parallel.registry import unwrap
from dist_trainer.run.memory import digest_bytes, snapshot_bytes, state_bytes, total_memory
from dist_trainer.run.resume import ResumeState
from dist_trainer.run.sameness import format_sums, log_changed_sums
from dist_trainer.tracking.formatting import duration, memory, quantity, significant
from dist_trainer.tracking.subprocess_tracker import format_exports
from dist_trainer.training.precision import warn_of_emulated_bf16
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)

LARGE_MODEL = 50_000_000
"""Parameters."""
NOTICEABLE_CHANGE = 0.01
"""Of the learning rate, relative to it."""


@dataclass(frozen=True)
class Cost:
    """What a dry run has measured, over all ranks."""

    first_loss: float
    """In nats per target token, before the first update."""
    step_seconds: float
    validation_seconds: float
    """One complete validation; 0: nothing is validated."""
    peak_bytes: list[int]
    """The most that each rank's device held, by rank."""
    steps: int
    """Steps left to do."""
    validations: int


def format_header(trainer: Trainer, folder: Path, *, is_dry: bool = False) -> str:
    """Steps, model, tokens, optimizer, devices, memory, output in the run's `folder`, and how to resume: a line each."""
    start, last = trainer.progress.step, trainer.max_steps
    steps = f"steps {start + 1}-{last}" if start < last else f"no step left after {start}, only the last validation"
    title, output = f"training {trainer.config.run_name}: {steps}, output in {folder}", _output(trainer, folder)
    if is_dry:
        title, output = f"dry run of {trainer.config.run_name}: {steps}", f"none; a run writes {output}"
    lines = {
        "model": _model(trainer),
        "tokens": _tokens(trainer),
        "optimizer": _optimizer(trainer),
        "devices": _devices(trainer),
        "sums": format_sums(trainer),
        **_sentinel(trainer),
        "memory": format_memory(trainer),
        "output": output,
        "resume": _resume(trainer),
    }
    return "\n".join([title, *_aligned(lines)])


def format_cost(cost: Cost, trainer: Trainer, folder: Path) -> str:
    """Time, memory and disk that the run in `folder` will need."""
    state, kept = state_bytes(trainer), trainer.config.checkpoint.keep_last + 2  # the best one, and one being written
    size, present = state["weights"] + state["optimizer"], len(step_folders(folder / CHECKPOINTS))
    free = shutil.disk_usage(nearest_existing(folder)).free
    problems = [] if math.isfinite(cost.first_loss) else ["the first loss is not finite"]
    problems += [] if (kept - min(kept, present)) * size <= free else ["the disk has too little space for its checkpoints"]
    verdict = f"works, but {' and '.join(problems)}" if problems else "OK"
    there = f", {present} present" if present else ""
    lines = {
        "time": _time(cost, trainer),
        "memory": _peak_memory(cost, trainer),
        "disk": f"{memory(size)} per checkpoint, up to {kept} kept ({memory(kept * size)}){there}; {memory(free)} free",
    }
    return "\n".join([f"dry run {verdict}; nothing written to {folder}", *_aligned(lines)])


def format_memory(trainer: Trainer) -> str:
    """`9.2 MiB weights + 9.2 MiB gradients + 18.4 MiB optimizer = 36.8 MiB per rank, plus activations; ...`."""
    state, device = state_bytes(trainer), trainer.world.device
    parts = " + ".join(f"{memory(size)} {name}" for name, size in state.items())
    place = "this machine" if device.type == "cpu" else str(device)
    has = f"{place} has {memory(total_memory(device))}{_pinned(trainer)}"
    return f"{parts} = {memory(sum(state.values()))} per rank, plus activations; {has}"


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest path above it that exists, of any kind."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))


def _model(trainer: Trainer) -> str:
    """`decoder_lm, 2.41M parameters in 4 layers of 192, random weights`."""
    config, step = trainer.config.model, trainer.progress.step
    size = f"{quantity(sum(parameter.numel() for parameter in trainer.parameters))} parameters"
    if config.name == "decoder_lm":
        size += f" in {counted(config.num_hidden_layers, 'layer')} of {config.hidden_size}"
    initial = f"weights of {config.init_from}" if is_pretrained(config) else "random weights"
    return f"{config.name}, {size}, {f'resumed after step {step}' if step else initial}"


def _tokens(trainer: Trainer) -> str:
    """`16 x 256 = 4.1k per step, 1.43M in total: 1.57 epochs of austen (3562 sequences)`."""
    config, sampler = trainer.config, trainer.sampler
    batch, length = config.batch.global_batch_size, config.data.sequence_length
    at_most = "at most " if varies_in_length(trainer.train_data.dataset) else ""
    return (
        f"{batch} x {at_most}{length} = {quantity(batch * length)} per step, "
        f"{quantity(trainer.max_steps * batch * length)} in total: {sampler.epoch_of(trainer.max_steps):.3g} epochs of "
        f"{config.data.dataset} ({counted(sampler.num_sequences, 'sequence')})"
    )


def _optimizer(trainer: Trainer) -> str:
    """`Muon + AdamW, peak learning rate 0.005 after 40 warmup steps, then cosine`."""
    schedule, optimizer = trainer.config.schedule, trainer.optimizer
    parts = optimizer.parts if isinstance(optimizer, MuonWithAdamW) else [optimizer]
    name = " + ".join(type(part).__name__ for part in parts)
    peak = max((rate for group in optimizer.param_groups if (rate := initial_learning_rate(group)) is not None), default=0.0)
    warmup = f" after {counted(schedule.warmup_steps, 'warmup step')}, then" if schedule.warmup_steps else ","
    return f"{name}, peak learning rate {peak:g}{warmup} {schedule.name}"


def _devices(trainer: Trainer) -> str:
    """`16 ranks x NVIDIA H100 on 2 machines, bf16, compiled, 2 micro-batches of 32 sequences per step`."""
    world = trainer.world
    machines = -(-world.world_size // world.local_world_size)
    many = f" on {machines} machines" if machines > 1 else ""
    threads = f" ({counted(torch.get_num_threads(), 'thread')})" if world.device.type == "cpu" else ""
    ranks = f"{counted(world.world_size, 'rank')} x {device_name(world.device)}{threads}{many}"
    compiled = "compiled" if is_compiled(unwrap(trainer.model)) else "not compiled"
    micro_batches = counted(trainer.accumulation_steps, "micro-batch", "es")
    sequences = counted(trainer.sampler.micro_batch_size, "sequence")
    return f"{ranks}, {trainer.precision.name}, {compiled}, {micro_batches} of {sequences} per step"


def _sentinel(trainer: Trainer) -> dict[str, str]:
    """`every 100 steps a second rank computes a micro-batch as well; stops if they disagree`; nothing without a sentinel."""
    distributed = trainer.config.distributed
    if distributed.sentinel_every_steps == 0:
        return {}
    every = counted(distributed.sentinel_every_steps, "step")
    policy = {"stop": "stops if they disagree", "redo": "redoes the step if they disagree"}[distributed.on_disagreement]
    return {"sentinel": f"every {every} a second rank computes a micro-batch as well; {policy}"}


def _output(trainer: Trainer, folder: Path) -> str:
    return f"report.html, metrics.jsonl, checkpoints/ and logs/ in {folder}; {format_exports(trainer.config.tracking)}"


def _resume(trainer: Trainer) -> str:
    every = trainer.config.checkpoint.every_steps
    saves = f"every {counted(every, 'step')}" if every else "after each best validation, at the end"
    return f"rerun the same command after a stop or crash; saves {saves} and when told to stop"


def _time(cost: Cost, trainer: Trainer) -> str:
    tokens = trainer.config.batch.global_batch_size * trainer.config.data.sequence_length
    work = counted(cost.steps, "step")
    if cost.validations:
        work += f" and {counted(cost.validations, 'validation')} of {duration(cost.validation_seconds)}"
    total = cost.steps * cost.step_seconds + cost.validations * cost.validation_seconds
    return (
        f"{significant(cost.step_seconds, 3)} s per step ({quantity(tokens / cost.step_seconds)} tokens/s): "
        f"{work} take about {duration(total)}, without compiling, samples and saving"
    )


def _peak_memory(cost: Cost, trainer: Trainer) -> str:
    """The most that any rank held; if ranks differ, also the least."""
    most, least, device = max(cost.peak_bytes), min(cost.peak_bytes), trainer.world.device
    total = total_memory(device)
    ranks = f" on rank {cost.peak_bytes.index(most)}, at least {memory(least)}" if most > least else ""
    if device.type == "cuda":
        return f"at most {memory(most)} ({most / total:.0%}) of a GPU's {memory(total)}{ranks}{_pinned(trainer)}"
    processes = f"; {len(cost.peak_bytes)} processes" if len(cost.peak_bytes) > 1 else ""
    return f"at most {memory(most)} of this machine's {memory(total)} per process{ranks}{processes}"


def _pinned(trainer: Trainer) -> str:
    """With a GPU, the host memory that saves and digests pin."""
    if trainer.world.device.type != "cuda":
        return ""
    digests = f" and digests {memory(size)}" if (size := digest_bytes(trainer)) else ""
    return f"; saves pin {memory(snapshot_bytes(trainer))}{digests} of host memory on rank 0"


def _aligned(lines: Mapping[str, str]) -> list[str]:
    width = max(map(len, lines)) + 2
    return [f"  {name:<{width}}{text}" for name, text in lines.items()]


def warn_of_settings(config: TrainingConfig, trainer: Trainer, start: ResumeState) -> None:
    """Log settings that are allowed but rarely what a user wants, and what has changed since the run was last started."""
    warn_of_unfinished_warmup(config.schedule, trainer.max_steps)
    warn_of_emulated_bf16(trainer.precision, trainer.world.device)
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
    log_changed_sums(trainer, start.metadata)


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
            "schedule.warmup_steps: %d, but the run has only %s, so the learning rate never reaches its peak",
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
