"""Folders that are either complete or absent.

A folder is first written under a hidden name in the same parent: every file is synced, the manifest (sizes and digests of all
files) comes last, then the folder is synced and renamed, and its parent synced. To delete a folder, it is first renamed to a
hidden name. So whatever a killed process leaves has a hidden name, and `remove_stale` removes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_trainer.storage.files import REFUSED, STAGING_PREFIX, remove, sync, warn_once
from dist_trainer.storage.manifest import MANIFEST, describe_files

log = logging.getLogger(__name__)

TRASH_PREFIX = ".trash-"
ASIDE_PREFIX = ".aside-"
CORRUPT_PREFIX, OLD_CORRUPT_PREFIX = "corrupt-", "damaged-"
"""Name prefixes of files and folders that were renamed because they do not belong there: since version 0.1, and before."""


def publish(folder: Path, write: Callable[[Path], None], *, metadata: dict[str, Any]) -> None:
    """Make `folder` appear with the files that `write` creates in the folder it is given, and in its manifest `metadata`, to
    which `write` may add what it finds out.

    Raises OSError if the disk refuses; then nothing is visible, an earlier `folder` is still there, and the staging folder is
    removed as far as possible.
    """
    staging = folder.with_name(f"{STAGING_PREFIX}{folder.name}")
    aside = folder.with_name(f"{ASIDE_PREFIX}{folder.name}")
    remove(staging)
    staging.mkdir(parents=True)
    try:
        write(staging)
        _add_manifest_and_sync(staging, metadata)
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


def _add_manifest_and_sync(staging: Path, metadata: dict[str, Any]) -> None:
    """Add the manifest, and return when everything in `staging` survives a power cut."""
    readable = staging.stat().st_mode & 0o666  # follows the user's umask; safetensors creates private files
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


def update_symlink(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target`, a sibling; readers see the old or the new one.

    Anything else that has its name is renamed. If the file system has no links, a warning says so, once.
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
    """The target of `link`, whether or not it exists; None if `link` is not a link."""
    try:
        return os.readlink(link)
    except OSError:
        return None


def delete_folder(folder: Path) -> None:
    """Delete `folder`; it is never visible under its name when incomplete."""
    trash = folder.with_name(f"{TRASH_PREFIX}{folder.name}")
    remove(trash)
    os.rename(folder, trash)
    sync(folder.parent)  # or a power cut could bring it back without the files that are deleted next
    remove(trash)


def quarantine(path: Path) -> Path:
    """Rename `path` to `corrupt-...`, and return the new path."""
    wanted = path.with_name(f"{CORRUPT_PREFIX}{path.name}")
    number, free = 1, wanted
    while os.path.lexists(free):
        number += 1
        free = wanted.with_name(f"{wanted.name}-{number}")
    path.rename(free)
    log.warning("%s is not what belongs there; it was renamed to %s", path, free.name)
    return free


def remove_stale(parent: Path) -> None:
    """Remove what interrupted writes and deletions left in `parent`, and restore a folder that was about to be replaced."""
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
