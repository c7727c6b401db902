"""Where a run begins: at its newest intact checkpoint, at another run's, or at step 0. Decided on rank 0 alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_trainer.checkpoint.folders import (
    find_checkpoint,
    latest_valid,
    step_folders,
    tidy_after_the_search,
    tidy_before_the_search,
)
from dist_trainer.checkpoint.state import Progress, read_training_state
from dist_trainer.config.keys import PATH_KEYS, as_written
from dist_trainer.config.loading import config_differences
from dist_trainer.config.paths import is_same_path, user_path
from dist_trainer.config.schema import TrainConfig, TrainingConfig
from dist_trainer.distributed.launcher import is_started_again
from dist_trainer.errors import AnotherRunError, CheckpointError, counted
from dist_trainer.run.folder import CHECKPOINTS, RunFolder
from dist_trainer.tracking.events import FIRST_CHECKPOINT
from dist_trainer.tracking.lenient_json import is_number
from dist_trainer.tracking.run_reader import read_events
from dist_trainer.tracking.status import read_status

log = logging.getLogger(__name__)

DEFINING_SECTIONS = ("model", "data", "optim", "schedule")
DEFINING_KEYS = ("seed", "batch.global_batch_size")
FREE_KEYS = ("data.cache_dir", "data.num_workers")
KNOWN_BY_CONTENT = {
    "data.dataset": "data_fingerprint",
    "data.tokenizer": "data_fingerprint",
    "data.chat_template": "data_fingerprint",
    "data.validation_dataset": "validation_fingerprint",
}
"""Defining keys that may name the same content by another path, and which fact tells whether they do."""


@dataclass(frozen=True)
class ResumeState:
    """What to go on from."""

    checkpoint: Path | None = None
    """None: step 0."""
    progress: Progress = field(default_factory=Progress)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What that run remembered of itself."""

    @property
    def train_before(self) -> TrainConfig | None:
        """The `train` section that the checkpoint was written under; None if it does not say."""
        section = self.metadata.get("config", {}).get("train")
        if not isinstance(section, Mapping):
            return None
        return TrainConfig(max_steps=section.get("max_steps"), epochs=section.get("epochs"))


def resolve_resume(config: TrainingConfig, folder: RunFolder) -> ResumeState:
    """What checkpoint.resume means for this run folder, as it is now; tidies up what a killed run left behind. With `never`, an
    earlier run stays where it is until the new one is known to be good; where a launcher has restarted ranks that crashed,
    the run that they began is none.

    Raises CheckpointError where checkpoints are there but none is intact, where those that were saved have gone, or where the
    folder cannot be written; AnotherRunError where the config is another run's.
    """
    if config.checkpoint.resume == "never" and not _began_in_this_launch(folder):
        folder.is_to_be_replaced = not folder.is_new
        return ResumeState()
    try:
        tidy_before_the_search(folder.checkpoints)
        start = _own_or_anothers(config, folder.path, prepares=True)
        folder.progress = start.progress
        return start
    except OSError as error:
        raise _out_of_order(error, folder.path) from error


def look_for_starting_point(config: TrainingConfig, folder: Path) -> ResumeState:
    """What `resolve_resume` would find in the run folder `folder`, without a lock, and with nothing written, moved or
    deleted: its run may be going on. Raises as that does.
    """
    if config.checkpoint.resume == "never":
        return ResumeState()
    try:
        return _own_or_anothers(config, folder, prepares=False)
    except OSError as error:
        raise _out_of_order(error, folder) from error


def _out_of_order(error: OSError, folder: Path) -> CheckpointError:
    named = error.filename if isinstance(error.filename, str) else folder
    return CheckpointError(f"{named} cannot be brought in order ({error.strerror}); see that {folder} can be read and written")


def _own_or_anothers(config: TrainingConfig, folder: Path, *, prepares: bool) -> ResumeState:
    """`prepares`: the folder is brought in line with it."""
    checkpoints = folder / CHECKPOINTS
    checkpoint = latest_valid(checkpoints)
    own = checkpoint is not None
    if not own:
        _refuse_to_start_over(folder)
    if checkpoint is None and config.checkpoint.resume not in ("auto", "never"):
        checkpoint = find_checkpoint(user_path(config.checkpoint.resume))
    if checkpoint is None:
        return ResumeState()
    state = read_training_state(checkpoint)
    _refuse_another_run(config, state, checkpoint)
    progress: Progress = state["progress"]
    if own and prepares:
        progress.best = tidy_after_the_search(checkpoints, checkpoint, keep_last=config.checkpoint.keep_last)
    elif not own:
        progress.best = None
    return ResumeState(checkpoint, progress, metadata={key: value for key, value in state.items() if key != "progress"})


def _refuse_to_start_over(folder: Path) -> None:
    """Where a checkpoint was saved once and there is no trace of any."""
    if is_number(read_status(folder).get("checkpoint_seconds")) or any(
        event["event"] == FIRST_CHECKPOINT for event in read_events(folder)
    ):
        raise CheckpointError(
            f"{folder / CHECKPOINTS} holds no checkpoint, but this run has saved some; bring them back, or begin anew with "
            "--checkpoint.resume never, which sets this run aside"
        )


def log_world_size_change(start: ResumeState, world_size: int, *, masks_depend_on_ranks: bool) -> None:
    """Log what going on with another number of ranks means: the order of data does not change, dropout may."""
    before = start.metadata.get("world_size")
    if before in (None, world_size):
        return
    if masks_depend_on_ranks:
        log.warning(
            "going on with %s (it was %d): the same global batches, but other dropout masks than without the change; "
            "with batch.micro_batch_size set they do not depend on the ranks",
            *(counted(world_size, "rank"), before),
        )
    else:
        log.info("going on with %s (it was %d): the same global batches", counted(world_size, "rank"), before)


def _began_in_this_launch(folder: RunFolder) -> bool:
    newest = next(iter(step_folders(folder.checkpoints)), None)
    try:
        return newest is not None and is_started_again(read_training_state(newest).get("launcher"))
    except CheckpointError:
        return False


def names_other_content(config: TrainingConfig, start: ResumeState) -> bool:
    """Whether a key of KNOWN_BY_CONTENT is not what it was when the run in `start` began."""
    if start.checkpoint is None:
        return False
    return any(key in KNOWN_BY_CONTENT for key, _, _ in config_differences(start.metadata.get("config", {}), config))


def refuse_other_content(config: TrainingConfig, start: ResumeState, fingerprints: Mapping[str, Any]) -> None:
    """Raises AnotherRunError if the data that were opened, with these `fingerprints`, are not those of the run to resume."""
    names = set(KNOWN_BY_CONTENT.values())
    other = {name for name in names if start.metadata.get(name) not in (None, fingerprints.get(name))}
    if not other:
        return
    assert start.checkpoint is not None, "a new run has no facts"
    differences = config_differences(start.metadata.get("config", {}), config)
    if renamed := [difference for difference in differences if KNOWN_BY_CONTENT.get(difference[0]) in other]:
        raise _another_run(renamed, start.checkpoint)
    data = config.data
    if "data_fingerprint" in other:
        name = f"data.dataset: {data.dataset}"
    else:
        name = f"data.validation_dataset: {data.validation_dataset or f'the validation split of {data.dataset}'}"
    raise AnotherRunError(
        f"{name} holds other text now than when the run in {start.checkpoint} began; "
        "bring the old text back, choose another --run_name, or begin anew with --checkpoint.resume never"
    )


def _refuse_another_run(config: TrainingConfig, state: Mapping[str, Any], checkpoint: Path) -> None:
    """Name every key that defines a run and differs; log those that may."""
    differences = config_differences(state.get("config", {}), config)
    if defining := [difference for difference in differences if _makes_another_run(difference, state)]:
        raise _another_run(defining, checkpoint)
    for key, before, now in differences:
        if not key.startswith("checkpoint.resume"):
            log.info("going on with %s %s (it was %s)", key, as_written(now), as_written(before))


def _another_run(differences: list[tuple[str, Any, Any]], checkpoint: Path) -> AnotherRunError:
    lines = "\n".join(
        f"  {key}: {as_written(now)}, but the run began with {as_written(before)}" for key, before, now in differences
    )
    return AnotherRunError(
        f"this config is not that of the run in {checkpoint}:\n{lines}\n"
        "set these keys back, choose another --run_name, or begin anew with --checkpoint.resume never"
    )


def _makes_another_run(difference: tuple[str, Any, Any], metadata: Mapping[str, Any]) -> bool:
    """Whether a key that differs from the run's `facts` means another run. One that names content by another path is judged by
    `refuse_other_content`, once that is opened.
    """
    key, before, now = difference
    is_renamed = before is not None and now is not None and metadata.get(KNOWN_BY_CONTENT.get(key, "")) is not None
    is_same = key in PATH_KEYS and is_same_path(before, now)
    return _defines_the_run(key) and not is_renamed and not is_same


def _defines_the_run(key: str) -> bool:
    return key not in FREE_KEYS and (key in DEFINING_KEYS or key.split(".")[0] in DEFINING_SECTIONS)
