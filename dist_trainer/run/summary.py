"""What a run is, said before its first step."""

from __future__ import annotations

from pathlib import Path

import torch

from dist_trainer.data.build_datasets import varies_in_length
from dist_trainer.distributed.machine import device_name
from dist_trainer.errors import counted
from dist_trainer.models.registry import begins_trained
from dist_trainer.optim.schedules import initial_learning_rate
from dist_trainer.parallel.compile import is_compiled
from dist_trainer.parallel.registry import unwrap
from dist_trainer.run.memory import snapshot_bytes, state_bytes, total_memory
from dist_trainer.tracking.formatting import aligned, memory, quantity
from dist_trainer.tracking.subprocess_tracker import format_exports
from dist_trainer.training.trainer import Trainer


def run_header(trainer: Trainer, folder: Path, *, is_dry: bool = False) -> str:
    """A line each on steps, model, tokens, updates, devices, memory, results and how to go on; `folder` is the run's.
    `is_dry`: whether it is a dry run, which writes nothing there.
    """
    rows = {
        "model": model_in_words(trainer),
        "tokens": tokens_in_words(trainer),
        "updates": updates_in_words(trainer),
        "devices": devices_in_words(trainer),
        "memory": memory_in_words(trainer),
        "results": f"{'none; a run writes ' if is_dry else ''}{results_in_words(trainer, folder)}",
        "resume": resume_in_words(trainer),
    }
    title = f"{trainer.config.run_name}: {steps_in_words(trainer.progress.step, trainer.max_steps)}, into {folder}"
    return "\n".join([title, *aligned(rows)])


def steps_in_words(start: int, most: int) -> str:
    """`steps 1 to 300`; where max_steps was lowered since, that none is left."""
    return f"steps {start + 1} to {most}" if start < most else f"no step left after {start}, the last validation is"


def model_in_words(trainer: Trainer) -> str:
    """`decoder_lm, 2.41M parameters in 4 layers of 192, random weights`."""
    config, step = trainer.config.model, trainer.progress.step
    size = f"{quantity(sum(parameter.numel() for parameter in trainer.parameters))} parameters"
    if config.name == "decoder_lm":
        size += f" in {counted(config.num_hidden_layers, 'layer')} of {config.hidden_size}"
    if step:
        origin = f"going on after step {step}"
    else:
        origin = f"weights of {config.init_from}" if begins_trained(config) else "random weights"
    return f"{config.name}, {size}, {origin}"


def tokens_in_words(trainer: Trainer) -> str:
    """`16 x 256 = 4.1k a step, 1.43M in all: 1.57 epochs of austen (3562 rows)`."""
    config, sampler = trainer.config, trainer.sampler
    rows, length = config.batch.global_batch_size, config.data.sequence_length
    at_most = "at most " if varies_in_length(trainer.train_data.dataset) else ""
    return (
        f"{rows} x {at_most}{length} = {quantity(rows * length)} a step, {quantity(trainer.max_steps * rows * length)} in all: "
        f"{sampler.epoch_of(trainer.max_steps):.3g} epochs of {config.data.dataset} ({counted(sampler.num_sequences, 'row')})"
    )


def updates_in_words(trainer: Trainer) -> str:
    """`MuonWithAdamW, learning rate up to 0.005 over 40 steps, then cosine`."""
    schedule, groups = trainer.config.schedule, trainer.optimizer.param_groups
    peak = max((rate for group in groups if (rate := initial_learning_rate(group)) is not None), default=0.0)
    warmup = f" over {counted(schedule.warmup_steps, 'step')}, then" if schedule.warmup_steps else ","
    return f"{type(trainer.optimizer).__name__}, learning rate up to {peak:g}{warmup} {schedule.name}"


def devices_in_words(trainer: Trainer) -> str:
    """`16 ranks x NVIDIA H100 on 2 machines, bf16, compiled, 2 micro-batches of 32 rows a step`."""
    world, steps = trainer.world, trainer.accumulation_steps
    machines = -(-world.world_size // world.local_world_size)
    many = f" on {machines} machines" if machines > 1 else ""
    threads = f" ({counted(torch.get_num_threads(), 'thread')})" if world.device.type == "cpu" else ""
    compiled = "compiled" if is_compiled(unwrap(trainer.model)) else "not compiled"
    rows = counted(trainer.sampler.micro_batch_size, "row")
    micro = f"{counted(steps, 'micro-batch', 'es')} of {rows} a step"
    ranks = f"{counted(world.world_size, 'rank')} x {device_name(world.device)}{threads}{many}"
    return f"{ranks}, {trainer.precision.name}, {compiled}, {micro}"


def memory_in_words(trainer: Trainer) -> str:
    """`9.2 MiB weights + 9.2 MiB gradients + 18.4 MiB optimizer = 36.8 MiB a rank, and activations; ...`."""
    state = state_bytes(trainer)
    parts = " + ".join(f"{memory(size)} {name}" for name, size in state.items())
    device = trainer.world.device
    where = "the machine" if device.type == "cpu" else str(device)
    pinned = f"; saves pin {memory(snapshot_bytes(trainer))} of host memory on rank 0" if device.type == "cuda" else ""
    return (
        f"{parts} = {memory(sum(state.values()))} a rank, and activations; {where} has {memory(total_memory(device))}{pinned}"
    )


def results_in_words(trainer: Trainer, folder: Path) -> str:
    """Which files, and where else lines go."""
    return f"report.html, metrics.jsonl, checkpoints/ and logs/ in {folder}; {format_exports(trainer.config.tracking)}"


def resume_in_words(trainer: Trainer) -> str:
    """How to go on after a stop, and from where."""
    every = trainer.config.checkpoint.every_steps
    saved = f"every {counted(every, 'step')}" if every else "after each best validation, at the end"
    return f"the same command goes on after a stop or a crash; saved {saved} and on a signal to stop"
