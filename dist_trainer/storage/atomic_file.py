"""Replacing a file whole: readers see the old or the new one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from dist_trainer.storage.files import sync_file, sync_folder

_BLOCK_BYTES = 4096
"""The smallest piece in which file systems give out room: a file that stays within it needs no more."""


def replace_file(path: Path, chunks: Iterable[bytes], *, durable: bool) -> None:
    """Put `chunks` into a hidden file beside `path` and rename it; `durable`: also after a power cut.

    Raises OSError where the disk refuses; then `path` is what it was.
    """
    staging = path.with_name(f".staging-{path.name}")
    staging.unlink(missing_ok=True)  # what a killed process left, or a link that someone laid there
    try:
        with staging.open("xb") as file:
            file.writelines(chunks)
            if durable:
                file.flush()
                sync_file(file.fileno(), path)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def replace_or_overwrite(path: Path, data: bytes, *, durable: bool) -> None:
    """As `replace_file`; where the disk has no room for a second file, over the one there, within the room that it has.

    `data` ends with what may be filled up with blanks, as JSON may. Raises OSError where that fails too.
    """
    try:
        replace_file(path, [data], durable=durable)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or len(data) > _BLOCK_BYTES:
            raise
        file = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            # One write, and blanks over what was longer: a reader never finds the end of the old behind the new.
            os.pwrite(file, data.ljust(os.fstat(file).st_size), 0)
            if durable:
                sync_file(file, path)
        finally:
            os.close(file)
