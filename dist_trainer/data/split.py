"""`Split`: records and a digest of their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dist_trainer.data.records import Records, format_of
from dist_trainer.data.text_file import unreadable
from dist_trainer.storage.files import replace_file
from dist_trainer.storage.manifest import digest_of_file


@dataclass(frozen=True)
class Split:
    """Some records of a source."""

    description: str
    """For log lines and messages."""
    records: Callable[[], Records]
    files: list[Path] = field(default_factory=list)
    """The files it consists of; their bytes give its digest unless it has a `content_digest`."""
    known_digest: str | None = None
    """An identifier of the content, if the source has one."""
    content_digest: Callable[[], str] | None = None
    """A digest of the records, if equal files do not mean equal content."""
    content_name: str = ""
    """What part of the files `content_digest` covers."""
    column_names: Callable[[], Collection[str]] = tuple
    """The columns of its first record; none if the beginning of the data does not show them."""

    def digest(self, memory: Path) -> str:
        """A digest of the content, cached in the folder `memory` by each file's size and modification time."""
        if self.known_digest is not None:
            return self.known_digest
        if self.content_digest is not None:
            if not self.files:
                return self.content_digest()
            return _cached(self.files, memory, self.content_digest, what=self.content_name)
        parts = (f"{format_of(path)} {_cached([path], memory, partial(digest_of_file, path))}" for path in self.files)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _cached(files: list[Path], memory: Path, compute: Callable[[], str], *, what: str = "bytes") -> str:
    """The result of `compute` for the current state of `files`, from the cache if it is there. Raises DataError."""
    try:
        stats = [(path.resolve(), path.stat()) for path in files]
        states = [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino] for path, stat in stats]
        identity = hashlib.sha256(json.dumps([what, *states]).encode())
        note = memory / f"{identity.hexdigest()[:32]}.txt"
        if (cached := _read_note(note)) is not None:
            return cached
        digest = compute()
    except OSError as error:
        raise unreadable(Path(error.filename or files[0]), error) from error
    with contextlib.suppress(OSError):  # such as a full disk: it is computed again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_file(note, [_with_checksum(note, digest).encode()], durable=False)
    return digest


def _read_note(note: Path) -> str | None:
    """The digest in the file; None if there is none, or if the file is damaged, as after a power cut."""
    try:
        content = note.read_text() if note.is_file() else ""
    except (OSError, ValueError):
        return None
    digest = content.partition(" ")[0]
    return digest if content and content == _with_checksum(note, digest) else None


def _with_checksum(note: Path, digest: str) -> str:
    return f"{digest} {hashlib.sha256(f'{note.name} {digest}'.encode()).hexdigest()}\n"
