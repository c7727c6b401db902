"""Replacing a file whole: readers see the old or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def replace_file(path: Path, chunks: Iterable[bytes], *, durable: bool) -> None:
    """Put `chunks` into a hidden file beside `path` and rename it; `durable`: also after a power cut.

    Raises OSError where the disk refuses; then `path` is what it was.
    """
    staging = path.with_name(f".staging-{path.name}")
    try:
        with staging.open("wb") as file:
            file.writelines(chunks)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
