"""What a sentinel costs: steps with a check take turns with steps without one, in one run of several ranks.

torchrun --nproc_per_node=2 -m benchmarks.sentinel_cost [--dtype fp32] [--windows 10] [--every 10]

A window is `--every` steps, the last of which is checked. Printed are a step without a check, what a check adds, and what
follows from these two: tokens/s with a sentinel, as a ratio to those without. Steps of one run that take turns are affected
alike by other load on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time

import torch

from benchmarks.machine import machine_and_versions
from dist_trainer.config.schema import (
    BatchConfig,
    DataConfig,
    DistributedConfig,
    ModelConfig,
    PrecisionConfig,
    TrackingConfig,
    TrainConfig,
    TrainingConfig,
    ValidationConfig,
)
from dist_trainer.distributed.context import init_distributed
from dist_trainer.run.build import build_trainer
from dist_trainer.run.resume import ResumeState
from dist_trainer.training.callbacks import CallbackList
from dist_trainer.training.step import StepResult
from dist_trainer.training.trainer import Trainer


class Stopwatch:
    """A callback."""

    def __init__(self) -> None:
        self.times: list[float] = []
        """When each step was done."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Read the clock once the step is computed."""
        if trainer.world.device.type == "cuda":
            torch.cuda.synchronize(trainer.world.device)
        self.times.append(time.perf_counter())


def config_of(arguments: argparse.Namespace, folder: str) -> TrainingConfig:
    """7M parameters, accumulation 4 on two ranks."""
    return TrainingConfig(
        output_dir=folder,
        model=ModelConfig(
            hidden_size=256, intermediate_size=768, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=4
        ),
        data=DataConfig(sequence_length=256),
        batch=BatchConfig(global_batch_size=16, micro_batch_size=2),
        precision=PrecisionConfig(dtype=arguments.dtype, compile=False),
        train=TrainConfig(max_steps=arguments.every * (arguments.windows + 1)),
        validation=ValidationConfig(every_steps=0),
        tracking=TrackingConfig(log_every_steps=10**6, wandb="disabled", sample_tokens=0),
        distributed=DistributedConfig(sentinel_every_steps=arguments.every),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--windows", type=int, default=10, help="that are timed, after one that is not")
    parser.add_argument("--every", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, init_distributed(DistributedConfig()) as world:
        trainer = build_trainer(config_of(arguments, folder), world, ResumeState())
        trainer.validation_data, stopwatch = None, Stopwatch()
        trainer.callbacks = CallbackList([stopwatch])
        trainer.fit()
        parameters = sum(parameter.numel() for parameter in trainer.parameters)
    if not world.is_main:
        return
    steps = [after - before for before, after in itertools.pairwise(stopwatch.times)][arguments.every - 1 :]
    windows = [steps[start : start + arguments.every] for start in range(0, len(steps), arguments.every)]
    plain = [statistics.median(window[:-1]) for window in windows]
    more = [(window[-1] - step) / step for window, step in zip(windows, plain, strict=True)]
    step, added = statistics.median(plain), statistics.median(more)
    print(f"{machine_and_versions()}\n{world.world_size} ranks, {parameters / 1e6:.2f}M parameters, {arguments.dtype}.")
    print(f"a step {step * 1000:.0f} ms; a check adds {added:.1%} of one ({min(more):.1%} to {max(more):.1%})")
    for every in (arguments.every, 10, 100):
        print(f"tokens/s with a check every {every} steps: {1 / (1 + added / every):.4f} of those without")


if __name__ == "__main__":
    main()
