"""A file that is only ever appended to, and can be gone on with from where it was last safe on disk."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from dist_trainer.storage.files import sync_file

CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Extent:
    """The beginning of a file: its length and its SHA-256."""

    num_bytes: int = 0
    digest: str = hashlib.sha256().hexdigest()


class GrowingFile:
    """The file at `path`, cut to `extent` and open at its end.

    Raises ValueError where its beginning is not as `extent` says, OSError where it cannot be opened or is a link.
    """

    def __init__(self, path: Path, extent: Extent) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        self._path, self._file = path, os.fdopen(descriptor, "r+b")
        self._hash = hashlib.sha256()
        try:
            self.num_bytes = self._read(extent.num_bytes)
            if Extent(self.num_bytes, self._hash.hexdigest()) != extent:
                raise ValueError(f"{path} is not as it was left")
            self._file.truncate(self.num_bytes)
        except BaseException:
            self._file.close()
            raise

    def _read(self, num_bytes: int) -> int:
        done = 0
        while chunk := self._file.read(min(CHUNK_BYTES, num_bytes - done)):
            self._hash.update(chunk)
            done += len(chunk)
        return done

    def append(self, array: np.ndarray) -> None:
        """Write the bytes of `array` behind what is there."""
        content = array.tobytes()
        self._file.write(content)
        self._hash.update(content)
        self.num_bytes += len(content)

    def secure(self) -> Extent:
        """Return when all that was appended would survive a power cut."""
        sync(self._file, self._path)
        return Extent(self.num_bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def sync(file: IO[bytes], path: Path) -> None:
    """Write out what Python and the system hold back of the open `file`, which `path` names."""
    file.flush()
    sync_file(file.fileno(), path)
