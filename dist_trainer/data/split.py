"""`Split`: records and a digest of what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dist_trainer.data.records import Records, unreadable

_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Split:
    """Some records of a source."""

    description: str
    """For log lines and messages."""
    records: Callable[[], Records]
    files: list[Path] = field(default_factory=list)
    """The files it is made of: their content is its digest."""
    known_digest: str | None = None
    """Digest by another means, where there are no files."""

    def digest(self, memory: Path) -> str:
        """A digest of the content, remembered under `memory` by each file's size and time of change."""
        if self.known_digest is not None:
            return self.known_digest
        parts = "\n".join(f"{path.suffix} {_file_digest(path, memory)}" for path in self.files)
        return hashlib.sha256(parts.encode()).hexdigest()


def _file_digest(path: Path, memory: Path) -> str:
    try:
        stat = path.stat()
        identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
        note = memory / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.txt"
        if note.is_file():
            return note.read_text()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    note.parent.mkdir(parents=True, exist_ok=True)
    staging = note.with_suffix(f".{id(digest)}")
    staging.write_text(digest.hexdigest())
    staging.replace(note)
    return digest.hexdigest()
