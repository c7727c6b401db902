"""A folder that exists whole or not at all.

Written beside its place under a hidden name, every file synced, the manifest (sizes and digests of all files) last, then
the folder synced, renamed, and its parent synced. Deleted by renaming to a hidden name first. What a killed process
leaves behind therefore always has a hidden name, and `sweep` removes it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_trainer.storage.files import REFUSED, sync, warn_once
from dist_trainer.storage.manifest import MANIFEST, describe_files

log = logging.getLogger(__name__)

STAGING_PREFIX = ".staging-"
TRASH_PREFIX = ".trash-"
ASIDE_PREFIX = ".aside-"
DAMAGED_PREFIX = "damaged-"


def publish(folder: Path, write: Callable[[Path], None], *, metadata: dict[str, Any]) -> None:
    """Make `folder` appear with what `write` puts into it, and `facts` in its manifest.

    Raises OSError where the disk refuses; then nothing is visible, what stood there before still does, and the staging
    folder is gone as far as possible.
    """
    staging = folder.with_name(f"{STAGING_PREFIX}{folder.name}")
    aside = folder.with_name(f"{ASIDE_PREFIX}{folder.name}")
    remove(staging)
    staging.mkdir(parents=True)
    try:
        write(staging)
        _seal(staging, metadata)
        if os.path.lexists(folder):
            remove(aside)
            os.rename(folder, aside)
        os.rename(staging, folder)
        sync(folder.parent)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(folder):
            os.rename(aside, folder)
        remove(staging)
        raise
    remove(aside)


def _seal(staging: Path, metadata: dict[str, Any]) -> None:
    """Add the manifest, and return when everything in `staging` survives a power cut."""
    readable = staging.stat().st_mode & 0o666  # as the user's umask has it; safetensors makes private files
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            with contextlib.suppress(OSError):  # vfat, CIFS and FUSE mounts may refuse it, and nothing relies on it
                path.chmod(readable)
            sync(path)
    manifest = staging / MANIFEST
    manifest.write_text(describe_files(staging, metadata), encoding="utf-8")
    sync(manifest)
    for directory in sorted({path.parent for path in staging.rglob("*")}, reverse=True):
        sync(directory)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`: readers see the old or the new one, also after a power cut."""
    staging = path.with_name(f"{STAGING_PREFIX}{path.name}")
    remove(staging)
    try:
        staging.write_text(text, encoding="utf-8")
        sync(staging)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync(path.parent)


def point(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target`, a sibling; readers see the old or the new one.

    What else may be there under its name is renamed. Where the file system has no links a warning says so, once.
    """
    if read_symlink(link) == target.name:
        return
    if os.path.lexists(link) and not link.is_symlink():
        quarantine(link)
    staging = link.with_name(f"{STAGING_PREFIX}{link.name}")
    remove(staging)
    try:
        staging.symlink_to(target.name)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        warn_once(link.parent, "symbolic links are", error, "checkpoints are saved all the same, without `latest` and `best`")
        return
    os.replace(staging, link)
    sync(link.parent)


def read_symlink(link: Path) -> str | None:
    """What the link says, whether or not it is there; None where `link` is none."""
    try:
        return os.readlink(link)
    except OSError:
        return None


def discard(folder: Path) -> None:
    """Delete `folder`; from the first moment on nobody sees a part of it under its name."""
    trash = folder.with_name(f"{TRASH_PREFIX}{folder.name}")
    remove(trash)
    os.rename(folder, trash)
    sync(folder.parent)  # or a power cut could bring it back without the files that are deleted next
    remove(trash)


def quarantine(path: Path) -> Path:
    """Rename `path` to `damaged-...`, and give its new name."""
    wanted = path.with_name(f"{DAMAGED_PREFIX}{path.name}")
    number, free = 1, wanted
    while os.path.lexists(free):
        number += 1
        free = wanted.with_name(f"{wanted.name}-{number}")
    path.rename(free)
    log.warning("%s is not what belongs there; it was renamed to %s", path, free.name)
    return free


def sweep(parent: Path) -> None:
    """Remove what interrupted writes and deletions left in `parent`, and bring back what was about to be replaced."""
    for path in list(parent.iterdir()) if parent.is_dir() else []:
        original = path.with_name(path.name.removeprefix(ASIDE_PREFIX))
        if path.name.startswith(ASIDE_PREFIX) and not os.path.lexists(original):
            path.rename(original)
        elif path.name.startswith((STAGING_PREFIX, TRASH_PREFIX, ASIDE_PREFIX)):
            remove(path)


def make_folder(path: Path) -> None:
    """`mkdir -p`, with names that survive a power cut. Raises OSError."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete what is at `path`, if anything; links are deleted, not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def refusal_of_the_disk(error: BaseException) -> str | None:
    """`ENOSPC: No space left on device`; None where `error` is something else.

    safetensors and tokenizers, which write by themselves, raise errors of their own with the number in the text.
    """
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number is None:
        return str(error) if isinstance(error, OSError) else None
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"
