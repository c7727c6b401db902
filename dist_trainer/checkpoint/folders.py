"""The checkpoints of a run: which ones exist, are valid, and are best; and the links `latest` and `best`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_trainer.checkpoint.state import STATE_FILE, Progress, Validated, read_training_state
from dist_trainer.config.paths import CHECKPOINTS
from dist_trainer.errors import CheckpointError
from dist_trainer.storage.files import format_disk_error
from dist_trainer.storage.folders import (
    CORRUPT_PREFIX,
    OLD_CORRUPT_PREFIX,
    delete_folder,
    quarantine,
    read_symlink,
    remove_stale,
    update_symlink,
)
from dist_trainer.storage.manifest import MANIFEST, read_manifest, verify

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
LATEST, BEST = "latest", "best"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """`step-00000200`."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first. They are complete, as only complete ones get such a name."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and not path.is_symlink()]
    return sorted(found, key=step_of, reverse=True)


# ------------------------------------------------------------------------------------- which one to resume from


def latest_valid(folder: Path) -> Path | None:
    """The newest valid checkpoint in `folder`: all its files are unchanged since they were written. None if there is none.

    Warns of damaged and missing ones. Raises CheckpointError if there are or were some, but none is valid.
    """
    candidates = step_folders(folder)
    latest = read_symlink(folder / LATEST)
    if latest and _STEP_FOLDER.fullmatch(latest) and not os.path.lexists(folder / latest):
        log.warning("invalid checkpoint skipped: %s, the latest one, is gone", folder / latest)
    for candidate in candidates:
        if is_valid(candidate):
            return candidate
    remains = [path.name for prefix in (CORRUPT_PREFIX, OLD_CORRUPT_PREFIX) for path in folder.glob(f"{prefix}step-*")]
    remains += [name for link in (LATEST, BEST) if (name := read_symlink(folder / link)) and _STEP_FOLDER.fullmatch(name)]
    if candidates or remains:
        which = f"there was {remains[0]}" if not candidates else "see the warnings above"
        raise CheckpointError(
            f"{folder} has checkpoints but none of them is valid ({which}); restore one from a backup, "
            "or start over with --checkpoint.resume never, which moves this run aside"
        )
    return None


def is_valid(checkpoint: Path) -> bool:
    """Whether a run can resume from `checkpoint`; a warning says why not."""
    try:
        manifest = verify(checkpoint)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(f"{checkpoint} has format version {manifest.get('format_version')!r}, not {FORMAT_VERSION}")
        step = read_training_state(checkpoint)["progress"].step
        if _STEP_FOLDER.fullmatch(checkpoint.name) and step_of(checkpoint) != step:
            raise CheckpointError(f"{checkpoint} holds step {step}, which does not match its name")
    except CheckpointError as error:
        log.warning("invalid checkpoint skipped: %s", error)
        return False
    return True


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: `path` itself, or the newest valid one of the run folder `path`."""
    if (path / MANIFEST).is_file():
        if is_valid(path):
            return path.resolve()
        raise CheckpointError(f"{path} is damaged (see the warning above); name another checkpoint")
    folder = path / CHECKPOINTS
    found = latest_valid(folder) if folder.resolve().is_relative_to(path.resolve()) else None
    if found is None:
        raise CheckpointError(f"checkpoint.resume: {path} is neither a checkpoint nor a run folder with checkpoints")
    return found


def resume_point(folder: Path, *, keep_last: int) -> tuple[Path, Progress] | None:
    """Clean up `folder`; returns its newest valid checkpoint and the progress in it, or None if there is no checkpoint.

    Raises CheckpointError if there are some, but none is valid.
    """
    repair_folder(folder)
    checkpoint = latest_valid(folder)
    if checkpoint is None:
        return None
    progress: Progress = read_training_state(checkpoint)["progress"]
    progress.best = repair_pointers(folder, checkpoint, keep_last=keep_last)
    return checkpoint, progress


# --------------------------------------------------------------------------------------- cleaning up, and rotation


def repair_folder(folder: Path) -> None:
    """Before the search: remove what a killed process left in `folder`, and restore a checkpoint that was about to be replaced
    or only exists under the name `latest` or `best`.
    """
    remove_stale(folder)
    for name in (LATEST, BEST):
        _resolve_copy(folder / name)


def repair_pointers(folder: Path, checkpoint: Path, *, keep_last: int) -> Validated | None:
    """After the search: make `folder` consistent with a resume from `checkpoint`, the newest valid one; returns the best one.

    Later ones are damaged and are renamed. The links are only hints and are set again. The rotation that a killed process may
    have left unfinished is completed.
    """
    for candidate in step_folders(folder):
        if step_of(candidate) > step_of(checkpoint):
            quarantine(candidate)
    best = best_checkpoint(folder, verified=checkpoint)
    rotate(folder, latest=checkpoint, best=best, keep_last=keep_last)
    return best


def best_checkpoint(folder: Path, *, verified: Path | None = None) -> Validated | None:
    """The best valid checkpoint in `folder`, by the validation loss stored in each; `verified` is known to be valid."""
    found: dict[Validated, Path] = {}
    for candidate in step_folders(folder):
        try:
            validated = read_training_state(candidate)["progress"].validated
        except CheckpointError:
            continue
        if validated is not None:
            found[validated] = candidate
    return next((validated for validated in sorted(found) if found[validated] == verified or is_valid(found[validated])), None)


def rotate(folder: Path, *, latest: Path, best: Validated | None, keep_last: int) -> None:
    """Point the links `latest` and `best` of `folder` at these checkpoints (None: there is no best one), and delete all but the
    `keep_last` newest, the best, and those that the links name. If either fails, the next save tries again.
    """
    # Separately: on a full disk no link can be set, but deleting frees space.
    with _retried_by_next_save(latest, "the links `latest` and `best` could not be set"):
        _set_links(folder, latest=latest, best=best)
    with _retried_by_next_save(latest, "older checkpoints could not be deleted"):
        kept = {read_symlink(folder / LATEST), read_symlink(folder / BEST), best and folder_name(best.step)}
        for candidate in step_folders(folder)[max(1, keep_last) :]:
            if candidate.name not in kept:
                delete_folder(candidate)


@contextmanager
def _retried_by_next_save(latest: Path, failure: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        log.warning("%s is saved, but %s (%s); the next save tries again", latest, failure, format_disk_error(error))


def _set_links(folder: Path, *, latest: Path, best: Validated | None) -> None:
    for link, target in ((folder / LATEST, latest), (folder / BEST, folder / folder_name(best.step) if best else None)):
        _resolve_copy(link)
        if target is not None:
            update_symlink(link, target)
        elif link.is_symlink():
            link.unlink()
        elif link.exists():
            quarantine(link)


def _resolve_copy(link: Path) -> None:
    """If `link` is a complete checkpoint instead of a link (`cp -rL` and other tools that follow links do that), keep one copy.

    It is renamed after its step if no valid checkpoint has that name, else deleted. Anything else under its name stays.
    """
    if link.is_symlink() or not link.is_dir():
        return
    try:
        copy = read_manifest(link)
        original = link.with_name(folder_name(read_training_state(link)["progress"].step))
    except CheckpointError:
        return
    if os.path.lexists(original) and is_valid(original):
        if _weights_and_optimizer(read_manifest(original)) == _weights_and_optimizer(copy):
            log.info("%s is a copy of %s; it is replaced by a link", link, original.name)
            delete_folder(link)
    elif is_valid(link):
        if os.path.lexists(original):
            quarantine(original)
        link.rename(original)
        log.info("%s was the only complete copy of its checkpoint; it was renamed to %s", link, original.name)


def _weights_and_optimizer(manifest: dict[str, Any]) -> dict[str, Any]:
    """Digests of all files except the state, which differs if a step was saved again after its validation."""
    return {name: entry for name, entry in manifest["files"].items() if name != STATE_FILE}
