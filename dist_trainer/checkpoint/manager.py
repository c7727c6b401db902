"""Saves snapshots behind the training's back, keeps the newest and the best, and finds what to go on from."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dist_trainer.checkpoint.state import Progress, Snapshot, read_training_state, write_training_state
from dist_trainer.checkpoint.storage import (
    DAMAGED_PREFIX,
    discard,
    make_folder,
    point,
    points_at,
    publish,
    put_out_of_the_way,
    sweep,
)
from dist_trainer.checkpoint.writer import BackgroundWriter, Save
from dist_trainer.config.schema import CheckpointConfig
from dist_trainer.errors import CheckpointError
from dist_trainer.manifest import MANIFEST, verify

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
LATEST, BEST = "latest", "best"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")

Export = Callable[[Mapping[str, Tensor], Path], None]
"""Writes weights by name (and what else makes a model usable) into a folder; `weights_writer(model)` gives one."""


class Checkpoints(Protocol):
    """What the trainer asks of them."""

    write_seconds: float | None
    """How long the slowest write of this process took; None before the first."""

    def save(self, take: Callable[[], Snapshot], *, is_best: bool, after: Callable[[], None]) -> None:
        """Save what `take` gives, now or in the background; it counts on what `after` makes durable."""
        ...

    def wait(self) -> None:
        """Until nothing is being written."""
        ...

    def failed_for_good(self) -> bool:
        """Whether saving failed too often to go on."""
        ...

    def trouble(self) -> str | None:
        """Why the last save, if it has ended, is not on the disk; None where it is."""
        ...

    def diverged(self) -> bool:
        """Whether that is because a number was not finite, and no disk's fault."""
        ...


class NoCheckpoints:
    """For ranks, and runs, that save nothing."""

    write_seconds: float | None = None
    """None: nothing is written."""

    def save(self, take: Callable[[], Snapshot], *, is_best: bool, after: Callable[[], None]) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing."""

    def failed_for_good(self) -> bool:
        """Never."""
        return False

    def trouble(self) -> str | None:
        """None."""
        return None

    def diverged(self) -> bool:
        """No."""
        return False


class CheckpointManager:
    """The checkpoints of one run folder, written by this process alone (rank 0, under the run folder's lock)."""

    def __init__(
        self, folder: Path, config: CheckpointConfig, *, export: Export, saved: Callable[[int, float], None] | None = None
    ) -> None:
        """`saved(step, seconds)` is called when a checkpoint has become visible, with the slowest write's time so far."""
        self.folder = folder
        self.keep_last = config.keep_last
        self.max_failures = config.max_failures
        self.export = export
        self.saved = saved or (lambda step, seconds: None)
        self.write_seconds: float | None = None
        """How long the slowest write took."""
        self._writer = BackgroundWriter(self._write)
        self._failures_in_a_row = 0
        self._trouble: str | None = None
        self._diverged = False
        make_folder(folder)

    def save(self, take: Callable[[], Snapshot], *, is_best: bool, after: Callable[[], None]) -> None:
        """Take a snapshot now and write it in the background, `after` what it counts on is durable (see BackgroundWriter.add).

        A disk that refuses is survived: training goes on, and the next save tries again.
        """
        self._writer.add(take, is_best=is_best, after=after)

    def wait(self) -> None:
        """Until the last save is on disk, or has failed; what is a crash and no full disk is raised here."""
        self._writer.wait()

    def failed_for_good(self) -> bool:
        """Whether `checkpoint.max_failures` saves in a row have failed."""
        return self._failures_in_a_row >= self.max_failures

    def trouble(self) -> str | None:
        """Why the last save, if it has ended, is not on the disk; None where it is."""
        return self._trouble

    def diverged(self) -> bool:
        """Whether that is because a number was not finite, and no disk's fault."""
        return self._diverged

    def _write(self, save: Save) -> None:
        snapshot, started = save.snapshot, time.perf_counter()
        step = snapshot.progress.step
        try:
            self._diverged = not snapshot.is_finite()
            if self._diverged:
                self._trouble = f"step {step}: not every number in the weights and the optimizer is finite"
                log.warning("%s; no checkpoint is written of them", self._trouble)
                return
            save.after()
            folder = self._publish(snapshot)
        except BaseException as error:
            refusal = refusal_of_the_disk(error)
            self._trouble = f"step {step}: the checkpoint could not be saved ({refusal or repr(error)})"
            if refusal is None:
                raise
            self._failures_in_a_row += 1
            log.warning(
                "%s, failure %d in a row; training goes on, older checkpoints are untouched, the next save tries again",
                *(self._trouble, self._failures_in_a_row),
            )
            return
        self._failures_in_a_row, self._trouble = 0, None
        self.write_seconds = max(self.write_seconds or 0.0, time.perf_counter() - started)
        self.saved(step, self.write_seconds)
        # Each by itself: on a full disk, where no pointer can be moved, it is the rotation that makes room.
        with _left_to_the_next_save(step):
            self._move_pointers(folder, snapshot.progress, is_best=save.is_best)
        with _left_to_the_next_save(step):
            self._rotate(snapshot.progress)

    def _publish(self, snapshot: Snapshot) -> Path:
        folder = self.folder / _name_of(snapshot.progress.step)

        def write(staging: Path) -> None:
            self.export(snapshot.weights, staging)
            write_training_state(snapshot, staging)

        facts = {"format_version": FORMAT_VERSION, "step": snapshot.progress.step}
        publish(folder, write, facts={**facts, "world_size": snapshot.facts.get("world_size")})
        return folder

    def _move_pointers(self, newest: Path, progress: Progress, *, is_best: bool) -> None:
        point(self.folder / LATEST, newest)
        best = newest if is_best else self._best_by(progress)
        if best is not None and best.is_dir():
            point(self.folder / BEST, best)

    def _rotate(self, progress: Progress) -> None:
        """Delete what is older than the newest ones; never what a pointer names, nor the best by what the run itself knows."""
        kept = {
            points_at(self.folder / LATEST),
            points_at(self.folder / BEST),
            progress.best_step and _name_of(progress.best_step),
        }
        for folder in step_folders(self.folder)[max(1, self.keep_last) :]:
            if folder.name not in kept:
                discard(folder)

    def _best_by(self, progress: Progress) -> Path | None:
        return None if progress.best_step is None else self.folder / _name_of(progress.best_step)


@contextmanager
def _left_to_the_next_save(step: int) -> Generator[None]:
    try:
        yield
    except OSError as error:
        log.warning("step %d is saved, but %s (the next save tries again)", step, refusal_of_the_disk(error))


def refusal_of_the_disk(error: BaseException) -> str | None:
    """`ENOSPC: No space left on device`; None where `error` is something else.

    safetensors and tokenizers, which write by themselves, raise errors of their own with the number in the text.
    """
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number is None:
        return str(error) if isinstance(error, OSError) else None
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(folder.name.removeprefix("step-"))


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; whole ones, as only whole ones have such a name."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and not path.is_symlink()]
    return sorted(found, key=step_of, reverse=True)


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files are all as they were written; None where there is none at all.

    Damaged ones are named in a warning, and one that has gone. Raises CheckpointError where none is left of those there were.
    """
    candidates = step_folders(folder)
    latest = points_at(folder / LATEST)
    if latest and _STEP_FOLDER.fullmatch(latest) and not os.path.lexists(folder / latest):
        log.warning("checkpoint passed over: %s has gone, and %s was the latest", folder / latest, latest)
    for candidate in candidates:
        if is_intact(candidate):
            return candidate
    remains = [path.name for path in folder.glob(f"{DAMAGED_PREFIX}step-*")]
    remains += [name for link in (LATEST, BEST) if (name := points_at(folder / link)) and _STEP_FOLDER.fullmatch(name)]
    if candidates or remains:
        which = f"there was {remains[0]}" if not candidates else "see the warnings above"
        raise CheckpointError(
            f"{folder} holds checkpoints but none of them is intact ({which}); restore one from a backup, "
            "or begin anew with --checkpoint.resume never, which sets this run aside"
        )
    return None


def is_intact(checkpoint: Path) -> bool:
    """Whether `checkpoint` can be gone on from; a warning says what is wrong with it."""
    try:
        manifest = verify(checkpoint)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(f"{checkpoint} has format version {manifest.get('format_version')!r}, not {FORMAT_VERSION}")
        step = read_training_state(checkpoint)["progress"].step
        if _STEP_FOLDER.fullmatch(checkpoint.name) and step_of(checkpoint) != step:
            raise CheckpointError(f"{checkpoint} holds step {step}, which is not what its name says")
    except CheckpointError as error:
        log.warning("checkpoint passed over: %s", error)
        return False
    return True


def prepare_to_resume(folder: Path, checkpoint: Path) -> tuple[int | None, float | None]:
    """Bring `folder` in line with going on from `checkpoint`, one of its own, and find the best up to there.

    Later folders are damaged ones: they are renamed out of the way. Pointers are only hints, so `best` is made anew from
    what the intact checkpoints say of their validation loss. Returns its step and loss.
    """
    best: Path | None = None
    best_loss: float | None = None
    for candidate in step_folders(folder):
        if step_of(candidate) > step_of(checkpoint):
            put_out_of_the_way(candidate)
            continue
        try:
            loss = own_validation_loss(read_training_state(candidate))
        except CheckpointError:
            continue
        better = loss is not None and (best_loss is None or loss < best_loss)
        if better and (candidate == checkpoint or is_intact(candidate)):
            best, best_loss = candidate, loss
    try:
        point(folder / LATEST, checkpoint)
        if best is not None:
            point(folder / BEST, best)
        elif (folder / BEST).is_symlink():
            (folder / BEST).unlink()
        elif (folder / BEST).exists():
            put_out_of_the_way(folder / BEST)
    except OSError as error:
        log.warning("%s: its pointers could not be moved (%s); the next save tries again", folder, refusal_of_the_disk(error))
    return (None, None) if best is None else (step_of(best), best_loss)


def resume_point(folder: Path) -> tuple[Path, Progress] | None:
    """The newest intact checkpoint in `folder` and how far it is, made the one that the pointers agree with; None: there
    is no checkpoint. Raises CheckpointError where none is intact.
    """
    sweep(folder)  # before the search: the newest one may have been about to be replaced
    checkpoint = newest_intact(folder)
    if checkpoint is None:
        return None
    progress: Progress = read_training_state(checkpoint)["progress"]
    progress.best_step, progress.best_loss = prepare_to_resume(folder, checkpoint)
    return checkpoint, progress


def own_validation_loss(state: dict[str, Any]) -> float | None:
    """Validation loss of exactly the checkpoint's weights; None where they were not validated."""
    progress = state["progress"]
    return progress.validation_loss if progress.validated_step == progress.step else None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest intact one of the run folder `path`."""
    if (path / MANIFEST).is_file():
        if is_intact(path):
            return path.resolve()
        raise CheckpointError(f"{path} is damaged (see the warning above); name another checkpoint")
    folder = path / "checkpoints"
    found = newest_intact(folder) if folder.resolve().is_relative_to(path.resolve()) else None
    if found is None:
        raise CheckpointError(f"checkpoint.resume: {path} is neither a checkpoint nor a run folder with checkpoints")
    return found
