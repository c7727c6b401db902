"""Small whole runs, through the same assembly as the command, and what they leave."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dist_trainer.config.schema import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
    TrainingConfig,
    ValidationConfig,
)
from dist_trainer.data.datasets import CORPUS
from dist_trainer.run import lifecycle
from dist_trainer.run.cli import run_cli
from dist_trainer.training.trainer import Trainer
from tests.distributed.ranks import exit_codes, run_ranks


def write_stories(path: Path) -> Path:
    """A JSONL file of 40 small documents of real text."""
    with gzip.open(CORPUS / "austen_train.jsonl.gz", "rt") as file:
        text = "".join(json.loads(next(file))["text"] for _ in range(2))
    parts = [text[start : start + 400] for start in range(0, 16000, 400)]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return path


def write_conversations(path: Path) -> Path:
    """A JSONL file of 60 conversations of real text, of very different lengths, with one answer or two."""
    with gzip.open(CORPUS / "austen_train.jsonl.gz", "rt") as file:
        words = iter(json.loads(next(file))["text"].split())
    lines = []
    for number in range(60):
        roles = ["system"] * (number % 3 == 0) + ["user", "assistant"] * (1 + number % 2)
        lengths = [2 + number * (7 + place) % 11 for place in range(len(roles))]
        messages = [
            {"role": role, "content": " ".join(next(words) for _ in range(length))}
            for role, length in zip(roles, lengths, strict=True)
        ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


def put_into_hub_cache(cache: Path, name: str, files: Iterable[Path]) -> None:
    """As the Hub's library keeps them: links to blobs, under one commit."""
    cached = cache / f"models--{name.replace('/', '--')}"
    for part in ("blobs", "refs", "snapshots/0123"):
        (cached / part).mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123")
    for file in files:
        shutil.copy(file, cached / "blobs" / file.name)
        (cached / "snapshots" / "0123" / file.name).symlink_to(f"../../blobs/{file.name}")


def small_config(data: Path, output_dir: Path, **changes: Any) -> TrainingConfig:
    """12 steps of 8 sequences of 32 tokens; `changes` are dotted keys with __ for the dot."""
    config = TrainingConfig(
        run_name="run",
        output_dir=str(output_dir),
        seed=3,
        model=ModelConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        ),
        data=DataConfig(dataset=str(data), sequence_length=32, validation_fraction=0.1),
        batch=BatchConfig(global_batch_size=8, micro_batch_size=2),
        optim=OptimConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=3),
        train=TrainConfig(max_steps=12),
        precision=PrecisionConfig(dtype="fp32"),
        validation=ValidationConfig(every_steps=5),
        checkpoint=CheckpointConfig(every_steps=4, keep_last=10),
        tracking=TrackingConfig(log_every_steps=1, wandb="disabled", sample_tokens=0),
        distributed=DistributedConfig(hang_timeout_minutes=1),
    )
    return changed(config, **changes)


def changed(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    """`config` with other values; dotted keys with __ for the dot."""
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})} if name else {key: value})
    return config


def run(config: TrainingConfig, world_size: int, *, before: Callable[[Trainer], None] | None = None) -> list[int]:
    """Run `config` on forked ranks; their exit codes. `before` may change each rank's trainer before it fits."""

    return run_ranks(world_size, lambda: one_rank(config, before))


def command(config: TrainingConfig, world_size: int, *, before: Callable[[Trainer], None] | None = None) -> list[int | None]:
    """As the command does it, on forked ranks: how each process ends."""
    return exit_codes(world_size, lambda: run_cli(lambda: one_rank(config, before)))


def one_rank(config: TrainingConfig, before: Callable[[Trainer], None] | None) -> int:
    torch.set_num_threads(1)
    if before is not None:
        fit = Trainer.fit

        def changed(trainer: Trainer) -> Any:
            before(trainer)
            return fit(trainer)

        Trainer.fit = changed
    return lifecycle.run(config)


def folder(config: TrainingConfig) -> Path:
    return Path(config.output_dir) / config.run_name


def metrics(config: TrainingConfig, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder(config) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(config: TrainingConfig, kind: str = "train") -> list[float]:
    return [line["loss"] for line in metrics(config, kind)]


def weights(config: TrainingConfig) -> dict[str, torch.Tensor]:
    return load_file(folder(config) / "checkpoints" / "latest" / "model.safetensors")


def status(config: TrainingConfig) -> dict[str, Any]:
    return json.loads((folder(config) / "status.json").read_text())


def same_weights(one: TrainingConfig, other: TrainingConfig) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def stop_after(step: int, *, rank: int = 0) -> Callable[[Trainer], None]:
    """Ask rank `rank` to stop as a signal would, once it has done `step` steps."""

    def change(trainer: Trainer) -> None:
        train_step = trainer.train_step

        def step_then_ask(*arguments: Any) -> Any:
            result = train_step(*arguments)
            if trainer.progress.step == step and trainer.world.rank == rank:
                trainer.world.stop_request.signal_number = 15
            return result

        trainer.train_step = step_then_ask

    return change


def at_each_validation_batch(act: Callable[[], Any]) -> Callable[[Trainer], None]:
    """`act` whenever a batch to validate on has been read."""

    def change(trainer: Trainer) -> None:
        validation = trainer.validation_data

        class Acting:
            sampler = validation.sampler

            def __iter__(self) -> Iterator[Any]:
                for batch in validation:
                    act()
                    yield batch

        trainer.validation_data = Acting()

    return change


def on_rank(rank: int, change: Callable[[Trainer], None]) -> Callable[[Trainer], None]:
    """`change`, on one rank alone."""
    return lambda trainer: change(trainer) if trainer.world.rank == rank else None
