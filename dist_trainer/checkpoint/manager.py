"""Saves snapshots behind the training's back, keeps the newest and the best, and finds what to go on from."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor

from dist_trainer.checkpoint.state import Progress, Snapshot, read_training_state, write_training_state
from dist_trainer.checkpoint.storage import discard, point, publish, sweep, verify
from dist_trainer.config.schema import CheckpointConfig
from dist_trainer.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
LATEST, BEST = "latest", "best"
DAMAGED_PREFIX = "damaged-"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")

Export = Callable[[Mapping[str, Tensor], Path], None]
"""Writes weights by name (and what else makes a model usable) into a folder; `weights_writer(model)` gives one."""


class Checkpoints(Protocol):
    """What the trainer asks of them."""

    write_seconds: float | None
    """How long the slowest write of this process took; None before the first."""

    def save(self, take: Callable[[], Snapshot], *, is_best: bool) -> None:
        """Save what `take` gives, now or in the background."""
        ...

    def wait(self) -> None:
        """Until nothing is being written."""
        ...

    def failed_for_good(self) -> bool:
        """Whether saving failed too often to go on."""
        ...


class NoCheckpoints:
    """For ranks, and runs, that save nothing."""

    write_seconds: float | None = None
    """None: nothing is written."""

    def save(self, take: Callable[[], Snapshot], *, is_best: bool) -> None:
        """Nothing."""

    def wait(self) -> None:
        """Nothing."""

    def failed_for_good(self) -> bool:
        """Never."""
        return False


class CheckpointManager:
    """The checkpoints of one run folder, written by this process alone (rank 0, under the run folder's lock)."""

    def __init__(self, folder: Path, config: CheckpointConfig, *, export: Export) -> None:
        self.folder = folder
        self.keep_last = config.keep_last
        self.max_failures = config.max_failures
        self.export = export
        self.write_seconds: float | None = None
        """How long the slowest write took."""
        self._writer: threading.Thread | None = None
        self._failures_in_a_row = 0
        self._crash: BaseException | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, take: Callable[[], Snapshot], *, is_best: bool) -> None:
        """Take a snapshot now and write it in the background; waits for the write before it, if there still is one.

        A disk that refuses is survived: training goes on, and the next save tries again.
        """
        self.wait()
        snapshot = take()
        self._writer = threading.Thread(target=self._write, args=(snapshot, is_best), name="checkpoint-writer")
        self._writer.start()

    def wait(self) -> None:
        """Until the last save is on disk, or has failed; what is a crash and no full disk is raised here."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._crash is not None:
            crash, self._crash = self._crash, None
            raise crash

    def failed_for_good(self) -> bool:
        """Whether `checkpoint.max_failures` saves in a row have failed."""
        return self._failures_in_a_row >= self.max_failures

    def _write(self, snapshot: Snapshot, is_best: bool) -> None:
        step = snapshot.progress.step
        try:
            if not snapshot.is_finite():
                log.warning("step %d: the weights are not finite; no checkpoint is written of them", step)
                return
            started = time.perf_counter()
            self._publish(snapshot, is_best)
            self.write_seconds = max(self.write_seconds or 0.0, time.perf_counter() - started)
            self._failures_in_a_row = 0
        except (OSError, SafetensorError) as error:
            self._failures_in_a_row += 1
            log.warning(
                "step %d: the checkpoint could not be saved (%s; failure %d in a row); training goes on, "
                "older checkpoints are untouched, the next save tries again",
                *(step, _reason(error), self._failures_in_a_row),
            )
        except BaseException as error:
            self._crash = error

    def _publish(self, snapshot: Snapshot, is_best: bool) -> None:
        folder = self.folder / f"step-{snapshot.progress.step:08d}"

        def write(staging: Path) -> None:
            self.export(snapshot.weights, staging)
            write_training_state(snapshot, staging)

        facts = {"format_version": FORMAT_VERSION, "step": snapshot.progress.step}
        publish(folder, write, facts={**facts, "world_size": snapshot.facts.get("world_size")})
        point(self.folder / LATEST, folder)
        if is_best:
            point(self.folder / BEST, folder)
        self._rotate()

    def _rotate(self) -> None:
        best = (self.folder / BEST).resolve()
        for folder in step_folders(self.folder)[max(1, self.keep_last) :]:
            if folder.resolve() != best:
                discard(folder)


def _reason(error: OSError | SafetensorError) -> str:
    """`ENOSPC: No space left on device`; safetensors tells the number in its text."""
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number is None:
        return str(error)
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; whole ones, as only whole ones have such a name."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and not path.is_symlink()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files are all as they were written; None where there is none at all.

    Damaged ones are named in a warning, and renamed out of the way. Raises CheckpointError where all are damaged.
    """
    candidates = step_folders(folder)
    for candidate in candidates:
        if is_intact(candidate):
            return candidate
    if candidates or any(folder.glob(f"{DAMAGED_PREFIX}*")):
        raise CheckpointError(
            f"{folder} holds checkpoints but none of them is intact (see the warnings above); restore one from a backup, "
            "or begin anew with --checkpoint.resume never, which sets this run aside"
        )
    return None


def is_intact(checkpoint: Path) -> bool:
    """Whether `checkpoint` can be gone on from; a warning says what is wrong with it."""
    try:
        manifest = verify(checkpoint)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(f"{checkpoint} has format version {manifest.get('format_version')}, not {FORMAT_VERSION}")
        read_training_state(checkpoint)
    except CheckpointError as error:
        log.warning("checkpoint passed over: %s", error)
        return False
    return True


def prepare_to_resume(folder: Path, checkpoint: Path) -> tuple[int | None, float | None]:
    """Bring `folder` in line with going on from `checkpoint`, one of its own, and find the best up to there.

    Later folders are damaged ones: they are renamed out of the way. Pointers are only hints, so `best` is made anew from
    what the intact checkpoints say of their validation loss. Returns its step and loss.
    """
    sweep(folder)
    best: Path | None = None
    best_loss: float | None = None
    for candidate in step_folders(folder):
        if candidate.name > checkpoint.name:
            candidate.rename(_free_name(folder / f"{DAMAGED_PREFIX}{candidate.name}"))
            continue
        try:
            loss = own_validation_loss(read_training_state(candidate))
        except CheckpointError:
            continue
        if loss is not None and (best_loss is None or loss < best_loss) and is_intact(candidate):
            best, best_loss = candidate, loss
    point(folder / LATEST, checkpoint)
    if best is None:
        (folder / BEST).unlink(missing_ok=True)
        return None, None
    point(folder / BEST, best)
    return int(best.name.removeprefix("step-")), best_loss


def resume_point(folder: Path) -> tuple[Path, Progress] | None:
    """The newest intact checkpoint in `folder` and how far it is, made the one that the pointers agree with; None: there
    is no checkpoint. Raises CheckpointError where none is intact.
    """
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
    if (path / "manifest.json").is_file():
        if is_intact(path):
            return path.resolve()
        raise CheckpointError(f"{path} is damaged (see the warning above); name another checkpoint")
    found = newest_intact(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"checkpoint.resume: {path} is neither a checkpoint nor a run folder with checkpoints")
    return found


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
