"""What some file systems refuse, such as vfat, CIFS and FUSE mounts: a run does without where it can, and says so once."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

REFUSED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF, errno.EPERM, errno.EACCES}
)
"""Errors of file systems that do not have an operation. A disk that fails or is full gives others."""
NO_LOCKS = (REFUSED | {errno.ENOLCK}) - {errno.EACCES}
"""EACCES: another process holds the lock."""

_said: set[tuple[str, int]] = set()


def warn_once(folder: Path, what: str, error: Exception, consequence: str) -> None:
    """Warn of what the file system of `folder` refuses, and of what follows from that; once for each in a process."""
    device = folder.stat().st_dev
    if (what, device) not in _said:
        _said.add((what, device))
        reason = getattr(error, "strerror", None) or error
        log.warning("%s: %s refused by this file system (%s); %s", folder, what, reason, consequence)


def sync_file(file: int, path: Path) -> None:
    """Return when the content of the open `file`, which `path` names, survives a power cut, as far as its file system can
    promise that. Raises OSError.
    """
    _fsync(file, path.parent, "fsync is", "a power cut may cost what was written last")


def sync_folder(folder: Path) -> None:
    """Return when the names in `folder` survive a power cut, as far as its file system can promise that. Raises OSError."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # it may be written in, but not listed; or no folder can be opened there
        return
    try:
        _fsync(file, folder, "fsync of a folder is", "a power cut may cost the newest files in it")
    finally:
        os.close(file)


def _fsync(file: int, folder: Path, what: str, consequence: str) -> None:
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        warn_once(folder, what, error, consequence)


def sync(path: Path) -> None:
    """Sync a file, or a folder's names. Raises OSError."""
    if path.is_dir():
        sync_folder(path)
        return
    file = os.open(path, os.O_RDONLY)
    try:
        sync_file(file, path)
    finally:
        os.close(file)
