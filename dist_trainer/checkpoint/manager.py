"""Saves snapshots behind the training's back, and keeps the newest and the best."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dist_trainer.checkpoint.folders import FORMAT_VERSION, best_checkpoint, bring_in_line, name_of
from dist_trainer.checkpoint.state import Snapshot, Validated, write_training_state
from dist_trainer.checkpoint.writer import BackgroundWriter, Save
from dist_trainer.config.schema import CheckpointConfig
from dist_trainer.storage.files import format_disk_error
from dist_trainer.storage.folders import make_folder, publish

log = logging.getLogger(__name__)

Export = Callable[[Mapping[str, Tensor], Path], None]
"""Writes weights by name (and what else makes a model usable) into a folder; `make_weight_saver(model)` gives one."""


class Checkpoints(Protocol):
    """What the trainer asks of them."""

    write_seconds: float | None
    """How long the slowest write of this process took; None before the first."""

    def begin_with(self, best: Validated | None) -> None:
        """The best checkpoint that is there already, where a run is resumed."""
        ...

    def best(self, noted: Validated | None) -> Validated | None:
        """`noted`, if its checkpoint is saved or is being saved; else, as that save has failed, the best that is saved."""
        ...

    def save(self, take: Callable[[], Snapshot], *, is_best: bool, after: Callable[[], None]) -> None:
        """Save what `take` gives, now or in the background; it counts on what `after` makes durable."""
        ...

    def wait(self) -> None:
        """Until nothing is being written."""
        ...

    def has_given_up(self) -> bool:
        """Whether saving failed too often to go on."""
        ...

    def has_published(self) -> bool:
        """Whether `take_published` would give any."""
        ...

    def take_published(self) -> list[tuple[int, Path]]:
        """Step and folder of the checkpoints that have become visible since the last call, oldest first."""
        ...

    def trouble(self) -> str | None:
        """Why the last save, if it has ended, is not on the disk; None where it is."""
        ...

    def diverged(self) -> bool:
        """Whether the reason is a number that is not finite, rather than the disk."""
        ...


class NoCheckpoints:
    """For ranks, and runs, that save nothing."""

    write_seconds: float | None = None
    """None: nothing is written."""

    def begin_with(self, best: Validated | None) -> None:
        """Nothing."""

    def best(self, noted: Validated | None) -> Validated | None:
        """`noted`: where nothing is saved, no save fails."""
        return noted

    def save(self, take: Callable[[], Snapshot], *, is_best: bool, after: Callable[[], None]) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing."""

    def has_given_up(self) -> bool:
        """Never."""
        return False

    def has_published(self) -> bool:
        """Never."""
        return False

    def take_published(self) -> list[tuple[int, Path]]:
        """None."""
        return []

    def trouble(self) -> str | None:
        """None."""
        return None

    def diverged(self) -> bool:
        """No."""
        return False


class CheckpointManager:
    """The checkpoints of one run folder, written by this process alone (rank 0, under the run folder's lock)."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        export: Export,
        saved: Callable[[int, float, Validated | None], None] | None = None,
    ) -> None:
        """`saved(step, seconds, best)` is called when a checkpoint has become visible, with the slowest write's time so far
        and the best of the checkpoints that are there.
        """
        self.folder = folder
        self.keep_last = config.keep_last
        self.max_failures = config.max_failures
        self.export = export
        self.saved = saved or (lambda step, seconds, best: None)
        self.write_seconds: float | None = None
        """How long the slowest write took."""
        self._writer = BackgroundWriter(self._write)
        self._failures_in_a_row = 0
        self._trouble: str | None = None
        self._diverged = False
        self._best: Validated | None = None
        self._published: deque[tuple[int, Path]] = deque()
        make_folder(folder)

    def begin_with(self, best: Validated | None) -> None:
        """The best checkpoint that is there already, where a run is resumed."""
        self._best = best if self._is_there(best) else None

    def best(self, noted: Validated | None) -> Validated | None:
        """`noted`, if its checkpoint is saved or is being saved; else, as that save has failed, the best that is saved."""
        if noted is not None and self._writer.holds(noted.step):
            return noted
        return self._best if self._is_there(self._best) else None

    def save(self, take: Callable[[], Snapshot], *, is_best: bool, after: Callable[[], None]) -> None:
        """Take a snapshot now and write it in the background, `after` what it counts on is durable (see BackgroundWriter.add).

        A disk that refuses is survived: training goes on, and the next save tries again.
        """
        self._writer.add(take, is_best=is_best, after=after)

    def wait(self) -> None:
        """Until the last save is on disk, or has failed; what is a crash and no full disk is raised here."""
        self._writer.wait()

    def has_given_up(self) -> bool:
        """Whether `checkpoint.max_failures` saves in a row have failed."""
        return self._failures_in_a_row >= self.max_failures

    def has_published(self) -> bool:
        """Whether `take_published` would give any."""
        return bool(self._published)

    def take_published(self) -> list[tuple[int, Path]]:
        """Step and folder of the checkpoints that have become visible since the last call, oldest first."""
        return [self._published.popleft() for _ in range(len(self._published))]

    def trouble(self) -> str | None:
        """Why the last save, if it has ended, is not on the disk; None where it is."""
        return self._trouble

    def diverged(self) -> bool:
        """Whether the reason is a number that is not finite, rather than the disk."""
        return self._diverged

    def _is_there(self, best: Validated | None) -> bool:
        return best is not None and (self.folder / name_of(best.step)).is_dir()

    def _write(self, save: Save) -> None:
        snapshot, started = save.snapshot, time.perf_counter()
        step = snapshot.progress.step
        try:
            spoiled = snapshot.non_finite()
            self._diverged = spoiled is not None
            if self._diverged:
                self._refuse(f"step {step}: not every number in the weights and the optimizer is finite ({spoiled})")
                return
            save.after()
            folder = self._publish(snapshot)
        except BaseException as error:
            refusal = format_disk_error(error)
            told = f"step {step}: the checkpoint could not be saved ({refusal or repr(error)})"
            if refusal is None:
                self._trouble = told
                raise
            self._refuse(told)
            return
        self._failures_in_a_row, self._trouble = 0, None
        self.write_seconds = max(self.write_seconds or 0.0, time.perf_counter() - started)
        self._note_best(folder, snapshot.progress.validated)
        self.saved(step, self.write_seconds, self._best)
        bring_in_line(self.folder, latest=folder, best=self._best, keep_last=self.keep_last)
        self._published.append((step, folder))

    def _refuse(self, told: str) -> None:
        self._trouble = told
        self._failures_in_a_row += 1
        log.warning(
            "%s, failure %d in a row; training goes on, older checkpoints are untouched, the next save tries again",
            *(told, self._failures_in_a_row),
        )

    def _note_best(self, saved: Path, own: Validated | None) -> None:
        """`saved` was just saved, and `own` is what was found when its weights were validated."""
        if self._is_there(self._best):
            self._best = min(entry for entry in (self._best, own) if entry is not None)
        else:  # none so far, or someone has deleted it
            self._best = best_checkpoint(self.folder, verified=saved)

    def _publish(self, snapshot: Snapshot) -> Path:
        folder = self.folder / name_of(snapshot.progress.step)

        def write(staging: Path) -> None:
            self.export(snapshot.weights, staging)
            write_training_state(snapshot, staging)

        metadata = {"format_version": FORMAT_VERSION, "step": snapshot.progress.step}
        publish(folder, write, metadata={**metadata, "world_size": snapshot.metadata.get("world_size")})
        return folder
