"""What all contestants train on: a model's shape, and sequences of tokens in the order of our own loader.

A workload is a folder, made once per comparison, so that every contestant reads the same bytes:

    workload.json        shape, batch, steps, number format
    sequences.npy        int32 [steps, global batch, T + 1]: what each step trains on
    config.yaml          the same for `python -m dist_trainer.train`
    text.jsonl, tokenizer/   a text that gives those tokens, because ours is timed as the command that users run
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

LEARNING_RATE = 3e-4
BETAS = (0.9, 0.95)
EPS = 1e-8
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
SEED = 0


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocabulary_size: int
    sequence_length: int
    rows_per_rank: int
    steps: int
    """How many are timed."""


SIZES = {
    # So small that a trainer's overhead per step is visible.
    "overhead": Size(64, 128, 2, 4, 4, 512, 64, 2, steps=3000),
    "1m": Size(128, 344, 4, 4, 4, 2048, 128, 8, steps=60),
    "7m": Size(256, 688, 6, 4, 4, 8192, 256, 8, steps=15),
    "30m": Size(512, 1376, 6, 8, 8, 16384, 512, 4, steps=8),
    "124m": Size(768, 2048, 12, 12, 12, 50304, 1024, 1, steps=5),
    # For one GPU.
    "124m-gpu": Size(768, 2048, 12, 12, 12, 50304, 1024, 32, steps=40),
    "1b-gpu": Size(2048, 8192, 16, 32, 8, 128256, 2048, 8, steps=15),
}


@dataclass(frozen=True)
class Workload:
    """The conditions of a comparison."""

    size: Size
    folder: Path
    ranks: int = 1
    dtype: str = "fp32"
    warmup_steps: int = 3
    """Steps before the timed ones."""
    save: bool = False
    """Whether a checkpoint is written after the middle one of the timed steps."""
    in_turn: bool = False
    """Whether a contestant makes a step of the bare loop after each of its own (see own_cost.py)."""

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.size.steps

    @property
    def save_at(self) -> int:
        """The step after which the checkpoint is written; beyond the last one if none is."""
        return self.warmup_steps + self.size.steps // 2 if self.save else self.total_steps + 1

    @property
    def global_batch_size(self) -> int:
        return self.size.rows_per_rank * self.ranks

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.size.sequence_length

    def all_sequences(self) -> np.ndarray:
        """int32 [steps, global batch, T + 1]."""
        return np.load(self.folder / "sequences.npy")

    def sequences(self, rank: int) -> np.ndarray:
        """int32 [steps, sequences of this rank, T + 1]."""
        share = self.size.rows_per_rank
        return self.all_sequences()[:, rank * share : (rank + 1) * share]

    def dump(self) -> None:
        """Write the conditions, for the contestants' processes."""
        said = dataclasses.asdict(self) | {"folder": str(self.folder)}
        (self.folder / "workload.json").write_text(json.dumps(said, indent=2))
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config_of(self)))

    @classmethod
    def load(cls, folder: Path) -> Workload:
        said = json.loads((folder / "workload.json").read_text())
        return cls(**said | {"size": Size(**said["size"]), "folder": folder})


def config_of(workload: Workload) -> dict[str, Any]:
    """The workload as a config of `python -m dist_trainer.train`."""
    size = workload.size
    shape = {name: getattr(size, name) for name in SHAPE}
    return {
        "run_name": "run",
        "seed": SEED,
        "model": shape,
        "data": {
            "dataset": str(workload.folder / "text.jsonl"),
            "tokenizer": str(workload.folder / "tokenizer"),
            "sequence_length": size.sequence_length,
            "validation_fraction": 0.0,
        },
        "batch": {"global_batch_size": workload.global_batch_size},
        "optim": {
            "name": "benchmarks.contestants.ours:timed_adamw",
            "learning_rate": LEARNING_RATE,
            "betas": list(BETAS),
            "eps": EPS,
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": MAX_GRAD_NORM,
        },
        "schedule": {"name": "constant", "warmup_steps": 0},
        "train": {"max_steps": workload.total_steps},
        "precision": {"dtype": workload.dtype},
        "checkpoint": {"every_steps": workload.save_at},
        # The other trainers have no tracker either; importing wandb during the first steps takes a core for seconds.
        "tracking": {"wandb": "disabled"},
    }


SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def prepare(workload: Workload) -> None:
    """Write the folder: a random text of V words, and the sequences that our loader makes of it, in its order."""
    _write_text(workload)
    workload.dump()
    sequences = _sequences_in_order(workload)
    np.save(workload.folder / "sequences.npy", sequences)


def _write_text(workload: Workload) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size, folder = workload.size, workload.folder
    words = [f"w{number}" for number in range(size.vocabulary_size - 1)]
    vocabulary = {word: number for number, word in enumerate([*words, "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "tokenizer")
    random = np.random.default_rng(SEED)
    # Zipf's law: the k-th word is about 1/k as frequent as the first.
    weights = 1.0 / np.arange(1, len(words) + 1)
    needed = (workload.total_steps + 1) * workload.tokens_per_step
    drawn = random.choice(len(words), size=needed, p=weights / weights.sum())
    with (folder / "text.jsonl").open("w") as file:
        for document in np.array_split(drawn, max(1, needed // 500)):
            file.write(json.dumps({"text": " ".join(words[number] for number in document)}) + "\n")


def _sequences_in_order(workload: Workload) -> np.ndarray:
    from dist_trainer import create_dataloaders, init_distributed
    from dist_trainer.run.configure import load_config

    config = load_config(["--config", str(workload.folder / "config.yaml")])
    with init_distributed(config.distributed) as world:
        batches = iter(create_dataloaders(config, world).train)
        sequences = []
        for _ in range(workload.total_steps):
            batch = next(batches)
            sequences.append(np.concatenate([batch.input_ids.numpy(), batch.targets.numpy()[:, -1:]], axis=1))
    return np.stack(sequences).astype(np.int32)
