"""Files that a reader finds complete or not at all. Some file systems (vfat, CIFS, FUSE mounts) lack operations: a run
continues without these if it can, and warns once.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

STAGING_PREFIX = ".staging-"
"""Prefix of the hidden name under which a file or folder is written before it is renamed."""
REFUSED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF, errno.EPERM, errno.EACCES}
)
"""Errors of file systems that lack an operation. A failing or full disk gives other errors."""
_BLOCK_BYTES = 4096
"""The smallest unit of space in most file systems: a file that stays within it needs no more."""

_warned: set[tuple[str, int]] = set()


@contextmanager
def staged_file(path: Path) -> Generator[Path]:
    """A hidden path next to `path` to write a file to; it replaces `path` at the end, so readers see the old or the new file.

    Raises OSError if the disk refuses; then, and if the block raises, `path` is unchanged.
    """
    staging = path.with_name(f"{STAGING_PREFIX}{path.name}")
    remove(staging)  # left by a killed process, or a link that someone put there
    try:
        yield staging
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def replace_file(path: Path, chunks: Iterable[bytes], *, durable: bool) -> None:
    """Replace `path` by a file of `chunks`, as `staged_file` does; `durable`: also after a power cut. Raises OSError."""
    with staged_file(path) as staging, staging.open("xb") as file:
        file.writelines(chunks)
        if durable:
            file.flush()
            sync_file(file.fileno(), path)
    if durable:
        sync_folder(path.parent)


def replace_or_overwrite(path: Path, data: bytes, *, durable: bool) -> None:
    """As `replace_file`; if the disk has no room for a second file, overwrite `path` within the space it already has.

    `data` may get trailing blanks, as JSON may. Raises OSError if that fails too.
    """
    try:
        replace_file(path, [data], durable=durable)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or len(data) > _BLOCK_BYTES:
            raise
        file = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            # One write, with blanks over the rest: a reader never finds the end of the old content after the new.
            os.pwrite(file, data.ljust(os.fstat(file).st_size), 0)
            if durable:
                sync_file(file, path)
        finally:
            os.close(file)


def open_for_writing(path: Path, *, append: bool = False) -> int:
    """Open or create `path` to read and write it in place; a descriptor. Raises OSError, also if `path` is a symbolic link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if append else 0), 0o644)


def truncate_file(path: Path, size: int) -> None:
    """Truncate `path` to its first `size` bytes, durably; this needs no disk space. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.ftruncate(file, size)
        sync_file(file, path)
    finally:
        os.close(file)


def remove(path: Path) -> None:
    """Delete the file or folder `path`, if there is one; a link is deleted, not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------- durability


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder. Raises OSError."""
    if path.is_dir():
        sync_folder(path)
        return
    file = os.open(path, os.O_RDONLY)
    try:
        sync_file(file, path)
    finally:
        os.close(file)


def sync_file(file: int, path: Path) -> None:
    """Return when the content of the descriptor `file`, opened from `path`, survives a power cut, as far as its file system
    can promise that. Raises OSError.
    """
    _fsync(file, path.parent, "fsync is", "a power cut may lose what was written last")


def sync_folder(folder: Path) -> None:
    """Return when the names in `folder` survive a power cut, as far as its file system can promise that. Raises OSError."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # it may be written to but not listed, or no folder can be opened there
        return
    try:
        _fsync(file, folder, "fsync of a folder is", "a power cut may lose the newest files in it")
    finally:
        os.close(file)


def _fsync(file: int, folder: Path, what: str, consequence: str) -> None:
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        warn_once(folder, what, error, consequence)


# --------------------------------------------------------------------------------------------------------- errors


def warn_once(folder: Path, what: str, error: Exception, consequence: str) -> None:
    """Warn about an operation that the file system of `folder` lacks, and the consequence; once per file system and process."""
    device = folder.stat().st_dev
    if (what, device) not in _warned:
        _warned.add((what, device))
        reason = getattr(error, "strerror", None) or error
        log.warning("%s: %s refused by this file system (%s); %s", folder, what, reason, consequence)


def format_disk_error(error: BaseException) -> str | None:
    """`ENOSPC: No space left on device`; None if `error` is not an error of the disk.

    safetensors and tokenizers write files themselves and raise their own errors, with the number in the text.
    """
    match = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    if number is None:
        return str(error) if isinstance(error, OSError) else None
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"
