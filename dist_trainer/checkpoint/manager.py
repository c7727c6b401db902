"""Saves snapshots in the background, and keeps the newest and the best checkpoints."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_trainer.checkpoint.digest import digest_of_folder
from dist_trainer.checkpoint.folders import FORMAT_VERSION, best_checkpoint, folder_name, rotate
from dist_trainer.checkpoint.state import Snapshot, Validated, write_training_state
from dist_trainer.config.schema import CheckpointConfig
from dist_trainer.huggingface.model_files import WEIGHTS_FILE
from dist_trainer.storage.files import format_disk_error
from dist_trainer.storage.folders import make_folder, publish

log = logging.getLogger(__name__)

SaveModel = Callable[[Mapping[str, Tensor], Path], None]
"""Writes weights by name, and everything else that a usable model needs, into a folder."""
QUICK_SECONDS = 0.25
"""How long a new save waits for the previous write. If steps take milliseconds, several saves are due during one write, and
dropping one would lose steps needlessly."""


class Checkpoints:
    """The interface that the trainer saves through. This class saves nothing, for ranks and runs without checkpoints."""

    saves = False

    def __init__(self) -> None:
        self.published: deque[tuple[int, Path]] = deque()
        """Steps and folders of the checkpoints that have become visible; `take_published` empties it."""
        self.last_error: str | None = None
        """Why the last finished save failed; None if it did not."""
        self.diverged = False
        """Whether it failed because of NaN or infinity, rather than the disk."""
        self.has_given_up = False
        """Whether `checkpoint.max_failures` saves in a row have failed."""

    def set_best(self, best: Validated | None) -> None:
        """On resume: the best checkpoint that exists."""

    def best(self, best: Validated | None) -> Validated | None:
        """`best` if its checkpoint is saved or being saved; if that has failed, the best that is saved."""
        return best

    def save(self, make_snapshot: Callable[[], Snapshot], *, is_best: bool, before_publish: Callable[[], None]) -> None:
        """Take a snapshot now and write it in the background; `before_publish` is called before any of it is visible.

        If writing fails, training continues, and the next save tries again.
        """

    def wait(self) -> None:
        """Return when the last save is on disk or has failed; raises what a write has raised, except for disk errors."""

    def take_published(self) -> list[tuple[int, Path]]:
        """The checkpoints published since the last call, oldest first."""
        return [self.published.popleft() for _ in range(len(self.published))]


@dataclass(frozen=True)
class Save:
    """A snapshot to write."""

    snapshot: Snapshot
    is_best: bool
    before_publish: Callable[[], None]
    """Makes everything durable that the checkpoint relies on; called before any of it is visible."""


class BackgroundWriter:
    """Does one write at a time, in a thread that lives as long as there is something to write."""

    def __init__(self, write: Callable[[Save], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._waiting: list[Save] = []
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None
        self._step_in_flight: int | None = None

    def holds(self, step: int) -> bool:
        """Whether a snapshot of `step` is waiting or being written."""
        with self._lock:
            return step == self._step_in_flight or any(save.snapshot.progress.step == step for save in self._waiting)

    def add(self, make_snapshot: Callable[[], Snapshot], *, is_best: bool, before_publish: Callable[[], None]) -> None:
        """Take a snapshot now, and write it as soon as the current write has finished.

        It replaces a snapshot that is still waiting, except that the best one is only replaced by a better one. So the newest
        and the best are always written. The host holds one copy of the state if each write ends before the next save, else two,
        or three if a waiting one is the best.
        """
        self.wait(QUICK_SECONDS)
        with self._lock:  # before the next copy takes up memory
            self._waiting = [save for save in self._waiting if save.is_best and not is_best]
        save = Save(make_snapshot(), is_best, before_publish)
        with self._lock:
            self._waiting.append(save)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-writer")
                self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Return when everything is written, or after `seconds`; raises what a write has raised, once."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        if self._crash is not None:
            crash, self._crash = self._crash, None
            raise crash

    def _work(self) -> None:
        while (save := self._next()) is not None:
            try:
                self._write(save)
            except BaseException as error:
                self._crash = error
            del save  # frees its memory before waiting for the next one

    def _next(self) -> Save | None:
        with self._lock:
            if self._crash is not None:
                self._waiting.clear()
            save = self._waiting.pop(0) if self._waiting else None
            self._step_in_flight = None if save is None else save.snapshot.progress.step
            if save is None:
                self._thread = None
            return save


class CheckpointManager(Checkpoints):
    """The checkpoints of one run folder, written only by this process (rank 0, under the run folder's lock)."""

    saves = True

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        save_model_fn: SaveModel,
        on_saved: Callable[[int, float, Validated | None, str | None], None] = lambda step, seconds, best, digest: None,
    ) -> None:
        """`on_saved(step, seconds, best, digest)` is called when a checkpoint has become visible, with the time of the slowest
        write so far, the best of the checkpoints that exist, and the digest of its weights.
        """
        super().__init__()
        self.folder, self.config, self.save_model_fn, self.on_saved = folder, config, save_model_fn, on_saved
        self._writer = BackgroundWriter(self._write)
        self._slowest_write = 0.0
        self._failures_in_a_row = 0
        self._best: Validated | None = None
        make_folder(folder)

    def set_best(self, best: Validated | None) -> None:
        """On resume: the best checkpoint that exists."""
        self._best = best

    def best(self, best: Validated | None) -> Validated | None:
        """`best` if its checkpoint is saved or being saved; if that has failed, the best that is saved."""
        if best is not None and self._writer.holds(best.step):
            return best
        return self._best if self._exists(self._best) else None

    def save(self, make_snapshot: Callable[[], Snapshot], *, is_best: bool, before_publish: Callable[[], None]) -> None:
        """See Checkpoints, and BackgroundWriter.add."""
        self._writer.add(make_snapshot, is_best=is_best, before_publish=before_publish)

    def wait(self) -> None:
        """See Checkpoints."""
        self._writer.wait()

    def _exists(self, best: Validated | None) -> bool:
        return best is not None and (self.folder / folder_name(best.step)).is_dir()

    def _write(self, save: Save) -> None:
        snapshot, started = save.snapshot, time.perf_counter()
        step = snapshot.progress.step
        try:
            spoiled = snapshot.non_finite()
            self.diverged = spoiled is not None
            if self.diverged:
                self._fail(f"step {step}: weights or optimizer state contain NaN/Inf ({spoiled}); checkpoint skipped")
                return
            save.before_publish()
            folder, digest = self._publish(snapshot)
        except BaseException as error:
            disk_error = format_disk_error(error)
            message = f"step {step}: the checkpoint could not be saved ({disk_error or repr(error)})"
            if disk_error is None:
                self.last_error = message
                raise
            self._fail(message)
            return
        self._failures_in_a_row, self.has_given_up, self.last_error = 0, False, None
        self._slowest_write = max(self._slowest_write, time.perf_counter() - started)
        self._update_best(folder, snapshot.progress.validated)
        self.on_saved(step, self._slowest_write, self._best, digest)
        rotate(self.folder, latest=folder, best=self._best, keep_last=self.config.keep_last)
        self.published.append((step, folder))

    def _fail(self, message: str) -> None:
        self.last_error = message
        self._failures_in_a_row += 1
        self.has_given_up = self._failures_in_a_row >= self.config.max_failures
        log.warning(
            "%s, failure %d in a row; training continues, older checkpoints are untouched, the next save tries again",
            *(message, self._failures_in_a_row),
        )

    def _update_best(self, saved: Path, validated: Validated | None) -> None:
        """Update the best checkpoint after `saved` was written; `validated`: its validation, if any."""
        if self._exists(self._best):
            self._best = min(entry for entry in (self._best, validated) if entry is not None)
        else:  # none so far, or it has been deleted
            self._best = best_checkpoint(self.folder, verified=saved)

    def _publish(self, snapshot: Snapshot) -> tuple[Path, str | None]:
        """The checkpoint, and the digest of its weights: of those in its file, whose names the saver decides. None if that does
        not write safetensors.
        """
        folder = self.folder / folder_name(snapshot.progress.step)
        metadata: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": snapshot.progress.step}
        metadata |= {"world_size": snapshot.metadata.get("world_size"), "weights_digest": None}

        def write(staging: Path) -> None:
            self.save_model_fn(snapshot.weights, staging)
            write_training_state(snapshot, staging)
            if (staging / WEIGHTS_FILE).is_file():
                metadata["weights_digest"] = digest_of_folder(staging)

        publish(folder, write, metadata=metadata)
        return folder, metadata["weights_digest"]
