"""`Split`: records and a digest of what they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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
        if (noted := _read_note(note)) is not None:
            return noted
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    with contextlib.suppress(OSError):  # a full disk: the digest is only taken once more the next time
        _write_note(note, digest.hexdigest())
    return digest.hexdigest()


def _read_note(note: Path) -> str | None:
    """The digest noted there; None where there is none, or not as it was written: a process may have died writing it."""
    try:
        content = note.read_text() if note.is_file() else ""
    except (OSError, ValueError):
        return None
    digest = content.partition(" ")[0]
    return digest if content and content == _sealed(note, digest) else None


def _write_note(note: Path, digest: str) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    try:
        os.write(file, _sealed(note, digest).encode())
    finally:
        os.close(file)


def _sealed(note: Path, digest: str) -> str:
    return f"{digest} {hashlib.sha256(f'{note.name} {digest}'.encode()).hexdigest()}\n"
