"""Saves snapshots in the background, and keeps the newest and the best checkpoints."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from dist_trainer.checkpoint.folders import FORMAT_VERSION, best_checkpoint, folder_name, rotate
from dist_trainer.checkpoint.state import Snapshot, Validated, write_training_state
from dist_trainer.checkpoint.writer import BackgroundWriter, Save
from dist_trainer.config.schema import CheckpointConfig
from dist_trainer.storage.files import format_disk_error
from dist_trainer.storage.folders import make_folder, publish

log = logging.getLogger(__name__)

SaveModel = Callable[[Mapping[str, Tensor], Path], None]
"""Writes weights by name, and what else makes a model usable, into a folder; `make_weight_saver(model)` returns one."""


class Checkpoints:
    """What the trainer needs to save; this one saves nothing, for ranks and runs without checkpoints."""

    saves = False

    def set_best(self, best: Validated | None) -> None:
        """On resume: the best checkpoint that exists."""

    def best(self, best: Validated | None) -> Validated | None:
        """`best` if its checkpoint is saved or is being saved; if that has failed, the best that is saved."""
        return best

    def save(self, make_snapshot: Callable[[], Snapshot], *, is_best: bool, before_publish: Callable[[], None]) -> None:
        """Save the snapshot, now or in the background; `before_publish` is called before any of it is visible."""

    def wait(self) -> None:
        """Return when nothing is being written; raises what a write has raised, unless it is an error of the disk."""

    def has_given_up(self) -> bool:
        """Whether too many saves in a row have failed."""
        return False

    def has_published(self) -> bool:
        """Whether `take_published` would return any."""
        return False

    def take_published(self) -> list[tuple[int, Path]]:
        """Step and folder of the checkpoints that have become visible since the last call, oldest first."""
        return []

    def last_error(self) -> str | None:
        """Why the last finished save has failed; None if it has not."""
        return None

    def diverged(self) -> bool:
        """Whether it has failed because of NaN or infinity, rather than the disk."""
        return False


class CheckpointManager(Checkpoints):
    """The checkpoints of one run folder, written by this process alone (rank 0, under the run folder's lock)."""

    saves = True

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        save_model_fn: SaveModel,
        on_saved: Callable[[int, float, Validated | None], None] | None = None,
    ) -> None:
        """`on_saved(step, seconds, best)` is called when a checkpoint has become visible, with the time of the slowest write so
        far and the best of the checkpoints that exist.
        """
        self.folder = folder
        self.keep_last = config.keep_last
        self.max_failures = config.max_failures
        self.save_model_fn = save_model_fn
        self.on_saved = on_saved or (lambda step, seconds, best: None)
        self._slowest_write_seconds = 0.0
        self._writer = BackgroundWriter(self._write)
        self._failures_in_a_row = 0
        self._last_error: str | None = None
        self._diverged = False
        self._best: Validated | None = None
        self._published: deque[tuple[int, Path]] = deque()
        make_folder(folder)

    def set_best(self, best: Validated | None) -> None:
        """On resume: the best checkpoint that exists."""
        self._best = best if self._exists(best) else None

    def best(self, best: Validated | None) -> Validated | None:
        """`best` if its checkpoint is saved or is being saved; if that has failed, the best that is saved."""
        if best is not None and self._writer.holds(best.step):
            return best
        return self._best if self._exists(self._best) else None

    def save(self, make_snapshot: Callable[[], Snapshot], *, is_best: bool, before_publish: Callable[[], None]) -> None:
        """Take a snapshot now and write it in the background, after `before_publish` (see BackgroundWriter.add).

        If the disk refuses, training continues, and the next save tries again.
        """
        self._writer.add(make_snapshot, is_best=is_best, before_publish=before_publish)

    def wait(self) -> None:
        """Return when the last save is on disk or has failed; raises what a write has raised, unless the disk refused it."""
        self._writer.wait()

    def has_given_up(self) -> bool:
        """Whether `checkpoint.max_failures` saves in a row have failed."""
        return self._failures_in_a_row >= self.max_failures

    def has_published(self) -> bool:
        """Whether `take_published` would return any."""
        return bool(self._published)

    def take_published(self) -> list[tuple[int, Path]]:
        """Step and folder of the checkpoints that have become visible since the last call, oldest first."""
        return [self._published.popleft() for _ in range(len(self._published))]

    def last_error(self) -> str | None:
        """Why the last finished save has failed; None if it has not."""
        return self._last_error

    def diverged(self) -> bool:
        """Whether it has failed because of NaN or infinity, rather than the disk."""
        return self._diverged

    def _exists(self, best: Validated | None) -> bool:
        return best is not None and (self.folder / folder_name(best.step)).is_dir()

    def _write(self, save: Save) -> None:
        snapshot, started = save.snapshot, time.perf_counter()
        step = snapshot.progress.step
        try:
            spoiled = snapshot.non_finite()
            self._diverged = spoiled is not None
            if self._diverged:
                self._fail(f"step {step}: weights or optimizer state contain NaN/Inf ({spoiled}); checkpoint skipped")
                return
            save.before_publish()
            folder = self._publish(snapshot)
        except BaseException as error:
            disk_error = format_disk_error(error)
            message = f"step {step}: the checkpoint could not be saved ({disk_error or repr(error)})"
            if disk_error is None:
                self._last_error = message
                raise
            self._fail(message)
            return
        self._failures_in_a_row, self._last_error = 0, None
        self._slowest_write_seconds = max(self._slowest_write_seconds, time.perf_counter() - started)
        self._update_best(folder, snapshot.progress.validated)
        self.on_saved(step, self._slowest_write_seconds, self._best)
        rotate(self.folder, latest=folder, best=self._best, keep_last=self.keep_last)
        self._published.append((step, folder))

    def _fail(self, message: str) -> None:
        self._last_error = message
        self._failures_in_a_row += 1
        log.warning(
            "%s, failure %d in a row; training continues, older checkpoints are untouched, the next save tries again",
            *(message, self._failures_in_a_row),
        )

    def _update_best(self, saved: Path, validated: Validated | None) -> None:
        """`saved` was just saved, and `validated` is what the validation of its weights found."""
        if self._exists(self._best):
            self._best = min(entry for entry in (self._best, validated) if entry is not None)
        else:  # none so far, or someone has deleted it
            self._best = best_checkpoint(self.folder, verified=saved)

    def _publish(self, snapshot: Snapshot) -> Path:
        folder = self.folder / folder_name(snapshot.progress.step)

        def write(staging: Path) -> None:
            self.save_model_fn(snapshot.weights, staging)
            write_training_state(snapshot, staging)

        metadata = {"format_version": FORMAT_VERSION, "step": snapshot.progress.step}
        publish(folder, write, metadata={**metadata, "world_size": snapshot.metadata.get("world_size")})
        return folder
