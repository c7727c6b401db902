"""The checkpoints of a run: which are there, which is intact, which is the best, what `latest` and `best` point at."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_trainer.checkpoint.state import STATE_FILE, Progress, Validated, read_training_state
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


def name_of(step: int) -> str:
    """`step-00000200`."""
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


# ------------------------------------------------------------------------------------- which one to resume from


def latest_valid(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files are all as they were written; None where there is none at all.

    Damaged ones are named in a warning, and one that has gone. Raises CheckpointError where none is left of those there were.
    """
    candidates = step_folders(folder)
    latest = read_symlink(folder / LATEST)
    if latest and _STEP_FOLDER.fullmatch(latest) and not os.path.lexists(folder / latest):
        log.warning("checkpoint passed over: %s has gone, and %s was the latest", folder / latest, latest)
    for candidate in candidates:
        if is_valid(candidate):
            return candidate
    remains = [path.name for prefix in (CORRUPT_PREFIX, OLD_CORRUPT_PREFIX) for path in folder.glob(f"{prefix}step-*")]
    remains += [name for link in (LATEST, BEST) if (name := read_symlink(folder / link)) and _STEP_FOLDER.fullmatch(name)]
    if candidates or remains:
        which = f"there was {remains[0]}" if not candidates else "see the warnings above"
        raise CheckpointError(
            f"{folder} holds checkpoints but none of them is intact ({which}); restore one from a backup, "
            "or begin anew with --checkpoint.resume never, which sets this run aside"
        )
    return None


def is_valid(checkpoint: Path) -> bool:
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


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest intact one of the run folder `path`."""
    if (path / MANIFEST).is_file():
        if is_valid(path):
            return path.resolve()
        raise CheckpointError(f"{path} is damaged (see the warning above); name another checkpoint")
    folder = path / "checkpoints"
    found = latest_valid(folder) if folder.resolve().is_relative_to(path.resolve()) else None
    if found is None:
        raise CheckpointError(f"checkpoint.resume: {path} is neither a checkpoint nor a run folder with checkpoints")
    return found


def resume_point(folder: Path, *, keep_last: int) -> tuple[Path, Progress] | None:
    """The newest intact checkpoint in `folder` and how far it is, with the folder tidied up; None: there is no checkpoint.

    Raises CheckpointError where none is intact.
    """
    tidy_before_the_search(folder)
    checkpoint = latest_valid(folder)
    if checkpoint is None:
        return None
    progress: Progress = read_training_state(checkpoint)["progress"]
    progress.best = tidy_after_the_search(folder, checkpoint, keep_last=keep_last)
    return checkpoint, progress


# ------------------------------------------------------------------------------------------- keeping it tidy


def tidy_before_the_search(folder: Path) -> None:
    """Bring back the newest checkpoint where it was about to be replaced, or is there as `latest` or `best` alone."""
    remove_stale(folder)
    for name in (LATEST, BEST):
        _take_in_copy(folder / name)


def tidy_after_the_search(folder: Path, checkpoint: Path, *, keep_last: int) -> Validated | None:
    """Bring `folder` in line with resuming from `checkpoint`, the newest intact one; gives the best one up to there.

    Later ones are damaged: they are renamed. Links are only hints: they are set again. What a killed process left of its last
    rotation is deleted.
    """
    for candidate in step_folders(folder):
        if step_of(candidate) > step_of(checkpoint):
            quarantine(candidate)
    best = best_checkpoint(folder, verified=checkpoint)
    bring_in_line(folder, latest=checkpoint, best=best, keep_last=keep_last)
    return best


def best_checkpoint(folder: Path, *, verified: Path | None = None) -> Validated | None:
    """The best intact checkpoint in `folder`, by what each says of its own validation; `verified` is known to be intact."""
    found: dict[Validated, Path] = {}
    for candidate in step_folders(folder):
        try:
            own = read_training_state(candidate)["progress"].validated
        except CheckpointError:
            continue
        if own is not None:
            found[own] = candidate
    return next((own for own in sorted(found) if found[own] == verified or is_valid(found[own])), None)


def bring_in_line(folder: Path, *, latest: Path, best: Validated | None, keep_last: int) -> None:
    """Let the links `latest` and `best` of `folder` point at these checkpoints (None: there is no best one), and delete all but
    the `keep_last` newest, the best, and those that the links name. What the disk refuses is left to the next save.
    """
    # Each by itself: on a full disk, where no link can be moved, it is the rotation that makes room.
    with _left_to_the_next_save(latest, "the links `latest` and `best` could not be set"):
        _set_links(folder, latest=latest, best=best)
    with _left_to_the_next_save(latest, "older checkpoints could not be deleted"):
        _rotate(folder, keep_last=keep_last, best=best)


@contextmanager
def _left_to_the_next_save(latest: Path, failure: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        log.warning("%s is saved, but %s (%s); the next save tries again", latest, failure, format_disk_error(error))


def _set_links(folder: Path, *, latest: Path, best: Validated | None) -> None:
    for link, target in ((folder / LATEST, latest), (folder / BEST, folder / name_of(best.step) if best else None)):
        _take_in_copy(link)
        if target is not None:
            update_symlink(link, target)
        elif link.is_symlink():
            link.unlink()
        elif link.exists():
            quarantine(link)


def _rotate(folder: Path, *, keep_last: int, best: Validated | None) -> None:
    kept = {read_symlink(folder / LATEST), read_symlink(folder / BEST), best and name_of(best.step)}
    for candidate in step_folders(folder)[max(1, keep_last) :]:
        if candidate.name not in kept:
            delete_folder(candidate)


def _take_in_copy(link: Path) -> None:
    """Where `link` is no link but a whole checkpoint, which `cp -rL` and tools that follow links make of one: keep it once.

    Renamed to its step's name if no intact checkpoint has that, else deleted. Anything else under the name stays.
    """
    if link.is_symlink() or not link.is_dir():
        return
    try:
        copy = read_manifest(link)
        original = link.with_name(name_of(read_training_state(link)["progress"].step))
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
    """Digests of all files but the state, which differs where a step was saved again after its validation."""
    return {name: entry for name, entry in manifest["files"].items() if name != STATE_FILE}
