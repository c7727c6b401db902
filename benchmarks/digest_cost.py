"""What digests of the weights cost: steps with one in their background alternate with steps without, in one run.

python -m benchmarks.digest_cost [--size 7m] [--dtype fp32] [--every 10] [--pairs 10]
torchrun --nproc_per_node 2 -m benchmarks.digest_cost ...

Blocks of `--every` steps alternate: before the first step of every second block a digest begins, as with
`--tracking.digest_every_steps`. So other load on the machine affects both alike. Printed are ratios over pairs of blocks (of
tokens/s, and of rank 0's CPU time, which other load changes less), how long training stands still for the copy, and the hash
alone in GB/s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants.model import adamw, build
from benchmarks.machine import machine_and_versions
from benchmarks.workloads import SIZES, Workload
from dist_trainer import Trainer, create_dataloaders, init_distributed, parallelize
from dist_trainer.checkpoint.digest import weights_digest
from dist_trainer.config.schema import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    PrecisionConfig,
    TrainConfig,
    TrainingConfig,
    ValidationConfig,
)
from dist_trainer.distributed.machine import usable_cpus
from dist_trainer.parallel.cpu.memory import keep_freed_memory
from dist_trainer.tracking.tracker import TrackerList
from dist_trainer.training.digests import WeightDigests
from dist_trainer.training.precision import build_precision
from dist_trainer.training.step import StepResult


class Alternating(WeightDigests):
    """Digests before every second block; a block's time is taken before that of the next one begins."""

    def __init__(self, every: int, model: torch.nn.Module) -> None:
        super().__init__(2 * every, model, TrackerList())
        self.block, self.began = every, (0.0, 0.0)
        self.blocks: list[tuple[float, float]] = []
        """Seconds and CPU seconds of each."""
        self.stalls: list[float] = []

    def on_step_end(self, trainer: Any, result: StepResult) -> None:
        """End a block, and begin the next one."""
        now, cpu = time.perf_counter(), time.process_time()
        if result.step % self.block == 0:
            self.blocks.append((now - self.began[0], cpu - self.began[1]))
            self.began = now, cpu
        super().on_step_end(trainer, result)
        if result.step % self.every_steps == 0:
            self.stalls.append(time.perf_counter() - now)


def hash_speed(model: torch.nn.Module, rounds: int = 7) -> tuple[float, float]:
    """GB/s of the hash, the median of some, and GB of weights."""
    state = model.state_dict()
    size, seconds = sum(tensor.nbytes for tensor in state.values()) / 1e9, []
    for _ in range(rounds):
        began = time.perf_counter()
        weights_digest(state.items())
        seconds.append(time.perf_counter() - began)
    return size / statistics.median(seconds), size


def spread(values: list[float], digits: int) -> str:
    """`0.998 (0.991 to 1.004)`: median, smallest, largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7m")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    size, every = SIZES[arguments.size], arguments.every
    if not torch.cuda.is_available():
        keep_freed_memory()  # as in a run
    config = TrainingConfig(
        data=DataConfig(sequence_length=size.sequence_length),
        batch=BatchConfig(global_batch_size=size.rows_per_rank),
        train=TrainConfig(max_steps=2 * every * (arguments.pairs + 1)),
        precision=PrecisionConfig(dtype=arguments.dtype),
        validation=ValidationConfig(every_steps=0),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    with init_distributed(config.distributed) as world:
        torch.set_num_threads(max(1, usable_cpus() // world.world_size))
        workload = Workload(size, Path())
        model = build(workload, world.device)
        rows = torch.randint(
            0, size.vocabulary_size, (64, size.sequence_length + 1), generator=torch.Generator().manual_seed(0)
        )
        train, _ = create_dataloaders(config, world, train_dataset=[(row[:-1], row[1:]) for row in rows])
        digests = Alternating(every, model)
        trainer = Trainer(
            config,
            world,
            model=parallelize(model, world),
            optimizer=adamw(model),
            train_data=train,
            precision=build_precision(config.precision, world.device),
            callbacks=[digests],
        )
        trainer.fit()
        if not world.is_main:
            return
        speed, gigabytes = hash_speed(model)
    # The first two blocks warm up. The second block of a pair began with a digest.
    plain, hashed = digests.blocks[2::2], digests.blocks[3::2]
    pairs = [*zip(plain, hashed, strict=True)]
    print(machine_and_versions())
    print(
        f"Size {arguments.size} ({gigabytes * 1000:.0f} MB of weights), {arguments.dtype}, {world.world_size} ranks, "
        f"{torch.get_num_threads()} threads each, a digest in {every} steps, {arguments.pairs} pairs of blocks.\n"
    )
    print("| | median (smallest to largest) |\n|---|---|")
    print(f"| tokens/s with digests, of those without | {spread([one[0] / other[0] for one, other in pairs], 3)} |")
    print(f"| CPU time with digests, of that without | {spread([other[1] / one[1] for one, other in pairs], 3)} |")
    print(f"| a step without, ms | {spread([seconds / every * 1000 for seconds, _ in plain], 1)} |")
    print(f"| its CPU time, ms | {spread([cpu / every * 1000 for _, cpu in plain], 1)} |")
    print(f"| training stands still, ms a digest | {spread([seconds * 1000 for seconds in digests.stalls[1:-1]], 1)} |")
    print(f"| the hash alone, GB/s | {speed:.2f} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
