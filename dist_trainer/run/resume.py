"""Which checkpoint a run resumes from: its newest valid one, another run's, or none. Decided on rank 0."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_trainer.checkpoint.folders import (
    find_checkpoint,
    latest_valid,
    repair_folder,
    repair_pointers,
    step_folders,
)
from dist_trainer.checkpoint.state import Progress, read_training_state
from dist_trainer.config.keys import PATH_KEYS
from dist_trainer.config.loading import config_differences
from dist_trainer.config.paths import CHECKPOINTS, is_same_path, user_path
from dist_trainer.config.schema import TrainConfig, TrainingConfig
from dist_trainer.config.values import format_value
from dist_trainer.distributed.launch_env import is_restarted_by
from dist_trainer.errors import AnotherRunError, CheckpointError
from dist_trainer.run.folder import RunFolder
from dist_trainer.tracking.run_reader import is_number, read_status
from dist_trainer.tracking.status import has_saved

log = logging.getLogger(__name__)

DEFINING_SECTIONS = ("model", "data", "optim", "schedule")
DEFINING_KEYS = ("seed", "batch.global_batch_size")
LOGGED_KEYS = ("batch.micro_batch_size", "distributed.reduction")
"""What run/sameness.py logs when they differ."""
FREE_KEYS = ("data.cache_dir", "data.num_workers")
FINGERPRINTED_KEYS = {
    "data.dataset": "data_fingerprint",
    "data.tokenizer": "data_fingerprint",
    "data.chat_template": "data_fingerprint",
    "data.validation_dataset": "validation_fingerprint",
}
"""Defining keys whose value may be another path to the same content, and the fingerprint of that content."""


@dataclass(frozen=True)
class ResumeState:
    """Where a run starts."""

    checkpoint: Path | None = None
    """None: at step 0."""
    progress: Progress = field(default_factory=Progress)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint says about its run."""
    replaces_run: bool = False
    """Whether a run that is in the folder is moved aside, as soon as the new one is known to be valid."""

    @property
    def train_before(self) -> TrainConfig | None:
        """The `train` section that the checkpoint was written under; None if unknown."""
        section = self.metadata.get("config", {}).get("train")
        if not isinstance(section, Mapping):
            return None
        return TrainConfig(max_steps=section.get("max_steps"), epochs=section.get("epochs"))

    def renamed_data(self, config: TrainingConfig) -> bool:
        """Whether `config` names data or tokenizer differently than the run did."""
        return self.checkpoint is not None and any(key in FINGERPRINTED_KEYS for key, _, _ in self.differences(config))

    def differences(self, config: TrainingConfig) -> list[tuple[str, Any, Any]]:
        """The keys that are not as they were when the checkpoint was written: (key, before, now)."""
        return config_differences(self.metadata.get("config", {}), config)


def resolve_resume(config: TrainingConfig, folder: RunFolder) -> ResumeState:
    """What checkpoint.resume means for this run folder now; cleans up after a killed run.

    With `never`, an earlier run stays in place until the new one is known to be valid; but ranks that their launcher restarted
    after a crash resume the run that they started. Raises CheckpointError if there are checkpoints but no valid one, if the
    saved ones are gone, or if the folder cannot be written; AnotherRunError if the config is another run's.
    """
    if config.checkpoint.resume == "never" and not _started_in_this_launch(folder):
        folder.is_to_be_archived = not folder.is_new
        return ResumeState(replaces_run=True)
    with _refused_access(folder.path):
        repair_folder(folder.checkpoints)
        start = _find(config, folder.path, tidies=True)
    folder.progress = start.progress
    return start


def preview_resume(config: TrainingConfig, folder: Path) -> ResumeState:
    """What `resolve_resume` would return for the run folder `folder`, without locking, writing, moving or deleting anything
    there: another job may be using it. Raises the same errors.
    """
    if config.checkpoint.resume == "never":
        return ResumeState()
    with _refused_access(folder):
        return _find(config, folder, tidies=False)


def check_same_data(config: TrainingConfig, start: ResumeState, fingerprints: Mapping[str, Any]) -> None:
    """Raises AnotherRunError if the opened data, with these `fingerprints`, are not those of the run to resume."""
    names = set(FINGERPRINTED_KEYS.values())
    changed = {name for name in names if start.metadata.get(name) not in (None, fingerprints.get(name))}
    if not changed:
        return
    assert start.checkpoint is not None, "a new run has no metadata"
    if renamed := [entry for entry in start.differences(config) if FINGERPRINTED_KEYS.get(entry[0]) in changed]:
        raise _another_run(renamed, start.checkpoint)
    data = config.data
    if "data_fingerprint" in changed:
        name = f"data.dataset: the text in {data.dataset}"
    elif data.validation_dataset is not None:
        name = f"data.validation_dataset: the text in {data.validation_dataset}"
    else:
        name = f"data.validation_dataset: the text in the validation split of {data.dataset}"
    raise AnotherRunError(
        f"{name} has changed since the run in {start.checkpoint} started; "
        "restore it, choose another --run_name, or start over with --checkpoint.resume never"
    )


def _find(config: TrainingConfig, folder: Path, *, tidies: bool) -> ResumeState:
    """`tidies`: links and old checkpoints in the folder are brought in line with what is found."""
    checkpoints = folder / CHECKPOINTS
    checkpoint = latest_valid(checkpoints)
    is_own = checkpoint is not None
    if not is_own:
        _check_nothing_saved(folder)
    if checkpoint is None and config.checkpoint.resume not in ("auto", "never"):
        checkpoint = find_checkpoint(user_path(config.checkpoint.resume))
    if checkpoint is None:
        return ResumeState()
    state = read_training_state(checkpoint)
    progress: Progress = state["progress"]
    start = ResumeState(checkpoint, progress, metadata={key: value for key, value in state.items() if key != "progress"})
    _check_same_run(config, start, checkpoint)
    if not is_own:
        progress.best = None
    elif tidies:
        progress.best = repair_pointers(checkpoints, checkpoint, keep_last=config.checkpoint.keep_last)
    return start


@contextmanager
def _refused_access(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        path = error.filename if isinstance(error.filename, str) else folder
        raise CheckpointError(
            f"{path} cannot be repaired ({error.strerror}); check that {folder} is readable and writable"
        ) from error


def _check_nothing_saved(folder: Path) -> None:
    """Raises CheckpointError if a folder without checkpoints has had some."""
    if is_number(read_status(folder).get("checkpoint_seconds")) or has_saved(folder):
        raise CheckpointError(
            f"{folder / CHECKPOINTS} contains no checkpoint, but this run has saved some; restore them, or start over with "
            "--checkpoint.resume never, which moves this run aside"
        )


def _started_in_this_launch(folder: RunFolder) -> bool:
    newest = next(iter(step_folders(folder.checkpoints)), None)
    try:
        return newest is not None and is_restarted_by(read_training_state(newest).get("launcher"))
    except CheckpointError:
        return False


def _check_same_run(config: TrainingConfig, start: ResumeState, checkpoint: Path) -> None:
    """Raises AnotherRunError with every key that defines a run and differs; logs those that may differ."""
    differences = start.differences(config)
    if defining := [entry for entry in differences if _makes_another_run(*entry, start.metadata)]:
        raise _another_run(defining, checkpoint)
    for key, before, now in differences:
        if key not in LOGGED_KEYS and not key.startswith("checkpoint.resume"):
            log.info("resuming with %s %s (was %s)", key, format_value(now), format_value(before))


def _another_run(differences: list[tuple[str, Any, Any]], checkpoint: Path) -> AnotherRunError:
    lines = "\n".join(
        f"  {key}: {format_value(now)}, but the run started with {format_value(before)}" for key, before, now in differences
    )
    return AnotherRunError(
        f"this config differs from the run in {checkpoint}:\n{lines}\n"
        "restore these keys, choose another --run_name, or start over with --checkpoint.resume never"
    )


def _makes_another_run(key: str, before: Any, now: Any, metadata: Mapping[str, Any]) -> bool:
    """Whether a key that differs makes this another run. Content under another path is left to `check_same_data`."""
    if key in FREE_KEYS or not (key in DEFINING_KEYS or key.split(".")[0] in DEFINING_SECTIONS):
        return False
    is_unchanged = key in PATH_KEYS and is_same_path(before, now)
    is_renamed = before is not None and now is not None and metadata.get(FINGERPRINTED_KEYS.get(key, "")) is not None
    return not is_unchanged and not is_renamed
