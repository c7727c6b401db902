"""Checkpoints without a run: a folder that holds steps 1 and 2, and the save of another one, in a process of its own."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

from dist_trainer.assembly import export_to
from dist_trainer.checkpoint.manager import CheckpointManager, resume_point
from dist_trainer.checkpoint.run_folder import RunFolder
from dist_trainer.checkpoint.state import Progress, Snapshot, take_snapshot
from dist_trainer.config.schema import CheckpointConfig, ModelConfig
from dist_trainer.models.registry import ModelContext, build_model
from dist_trainer.precision import Precision

LOSSES = {1: 3.0, 2: 3.5, 3: 2.5}
"""Validation loss at each step: the third is the best, until then the first."""


@functools.cache
def small_model() -> nn.Module:
    shape = ModelConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return build_model(shape, ModelContext(64, 16, seed=1, device=torch.device("cpu")))


@functools.cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<eos>": 0, "it": 1, "is": 2})), eos_token="<eos>")


@functools.cache
def snapshot(step: int) -> Snapshot:
    """What a run that was trained to `step` would save."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    best = min((s for s in LOSSES if s <= step), key=lambda s: LOSSES[s])
    progress = Progress(step, 100 * step, step, LOSSES[step], best, LOSSES[best])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    scaler = Precision("fp32", torch.device("cpu")).state_dict()
    return take_snapshot(model, optimizer, scaler=scaler, progress=progress, facts={"world_size": 1})


def save(run_folder: Path, step: int, *, keep_last: int = 1, in_thread: Callable[..., None] | None = None) -> None:
    """Save `step` as a run does, under the folder's lock; `in_thread` is the profile function of the thread that writes."""
    folder = RunFolder(run_folder)
    export = export_to(small_model(), small_tokenizer())
    manager = CheckpointManager(folder.checkpoints, CheckpointConfig(keep_last=keep_last), export=export)
    taken = snapshot(step)
    threading.setprofile(in_thread)
    manager.save(lambda: taken, is_best=taken.progress.best_step == step)
    manager.wait()
    threading.setprofile(None)
    folder.close()
    assert manager.trouble() is None, manager.trouble()


def next_start(run_folder: Path) -> tuple[Path, Progress]:
    """What a run finds at its start, after it has brought its folder in order."""
    folder = RunFolder(run_folder)
    try:
        found = resume_point(folder.checkpoints)
    finally:
        folder.close()
    assert found is not None, "there is no checkpoint"
    return found


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True)
    return target
