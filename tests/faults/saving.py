"""Saving and nothing else: quick enough to die before each single file operation of it, in a process forked for that."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from dist_trainer.checkpoint.folders import resume_point
from dist_trainer.checkpoint.manager import CheckpointManager, SaveModel
from dist_trainer.checkpoint.state import Progress, Snapshot
from dist_trainer.config.schema import CheckpointConfig, ModelConfig, TrainingConfig
from dist_trainer.data.tokenizers import load_tokenizer
from dist_trainer.models.registry import ModelContext, build_model
from dist_trainer.run.build import make_model_saver
from dist_trainer.run.folder import RunFolder
from dist_trainer.run.resume import resolve_resume
from dist_trainer.storage.manifest import verify
from tests.faults.file_operations import Operations
from tests.faults.processes import Ended, Process

SIZES = ModelConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
CONTEXT = ModelContext(vocabulary_size=64, sequence_length=8, seed=0, device=torch.device("cpu"))


class Saver:
    """A run's folder, saved into as a run does it: with all files of a checkpoint, two kept and the best one."""

    def __init__(self, folder: Path, model: nn.Module | None = None, save_model: SaveModel | None = None) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.model = model or build_model(SIZES, CONTEXT)
        self.save_model = save_model or make_model_saver(self.model, load_tokenizer("austen"))

    def at(self, folder: Path) -> Saver:
        """The same, with a copy of its folder."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Saver(folder, self.model, self.save_model)

    def save(self, *steps: int) -> CheckpointManager:
        """Each step is better than the one before, and every number of its weights is its own."""
        manager = CheckpointManager(self.checkpoints, CheckpointConfig(keep_last=2), save_model_fn=self.save_model)
        for step in steps:
            manager.wait()
            manager.save(lambda step=step: self.snapshot(step), is_best=True, before_publish=lambda: None)
        manager.wait()
        return manager

    def save_again(self) -> CheckpointManager:
        """The newest step, which is replaced."""
        return self.save(max(int(path.name[5:]) for path in self.checkpoints.glob("step-*")))

    def snapshot(self, step: int) -> Snapshot:
        loss = 1 / step
        return Snapshot(
            weights={name: torch.full_like(tensor, step) for name, tensor in self.model.state_dict().items()},
            optimizer_tensors={"layer::exp_avg": torch.full((4, 4), float(step))},
            optimizer_values={"layer::step": float(step)},
            scaler={},
            progress=Progress(step, validated_step=step, validation_loss=loss, best_step=step, best_loss=loss),
        )

    def start(self) -> int:
        """What the next start does to the folder; the step that it goes on from."""
        run = RunFolder(self.folder)
        try:
            # The config is not compared: these snapshots remember none.
            start = resolve_resume(TrainingConfig(), run)
        finally:
            run.close()
        if start.checkpoint is None:
            return 0
        verify(start.checkpoint)
        assert all(
            bool((tensor == start.progress.step).all()) for tensor in load_file(start.checkpoint / "model.safetensors").values()
        )
        return start.progress.step

    def resume(self) -> int:
        """The same, where a script of one's own goes on with `Trainer.resume`."""
        found = resume_point(self.checkpoints, keep_last=2)
        return 0 if found is None else found[1].step

    def start_again(self) -> int:
        """The same, once more, which finds nothing left to do."""
        before = self.names()
        step = self.start()
        assert self.names() == before
        return step

    def names(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*"))

    def litter(self) -> list[str]:
        return [name for name in self.names() if "/." in f"/{name}" and name != ".lock"]


def watched(operations: Operations, act: Callable[[], object]) -> Ended:
    """`act` in a forked process, while `operations` sees what its threads do to files."""

    def live() -> int:
        threading.setprofile(operations)
        sys.setprofile(operations)
        act()
        sys.setprofile(None)
        return 0

    return Process(live).wait()
