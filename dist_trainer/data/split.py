"""`Split`: records and a digest of what they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dist_trainer.data.records import Records, reading_of
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
    """The files it is made of: their bytes are its digest, unless it has a content digest."""
    known_digest: str | None = None
    """A name for the content that its maker vouches for."""
    content_digest: Callable[[], str] | None = None
    """The digest of what the records say, where equal bytes are not what equal content means."""
    content_name: str = ""
    """What of the files it is the digest of."""
    column_names: Callable[[], Collection[str]] = tuple
    """The columns of its first record, as far as these can be told from the beginning; none where they cannot."""

    def digest(self, memory: Path) -> str:
        """A digest of the content, remembered under `memory` by each file's size and time of change."""
        if self.known_digest is not None:
            return self.known_digest
        if self.content_digest is not None:
            if not self.files:
                return self.content_digest()
            return _remembered(self.files, memory, self.content_digest, what=self.content_name)
        parts = (f"{reading_of(path)} {_remembered([path], memory, partial(_digest_of_bytes, path))}" for path in self.files)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _remembered(files: list[Path], memory: Path, take: Callable[[], str], *, what: str = "bytes") -> str:
    """What `take` gave when it was last called for `files` as they are now."""
    identity = hashlib.sha256(json.dumps([what, *(_identity(path) for path in files)]).encode())
    note = memory / f"{identity.hexdigest()[:32]}.txt"
    if (noted := _read_note(note)) is not None:
        return noted
    digest = take()
    with contextlib.suppress(OSError):  # a full disk: the digest is only taken once more the next time
        _write_note(note, digest)
    return digest


def _identity(path: Path) -> list[str | int]:
    try:
        stat = path.stat()
        return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    except OSError as error:
        raise unreadable(path, error) from error


def _digest_of_bytes(path: Path) -> str:
    try:
        return digest_of_file(path)
    except OSError as error:
        raise unreadable(path, error) from error


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
    replace_file(note, [_sealed(note, digest).encode()], durable=False)


def _sealed(note: Path, digest: str) -> str:
    return f"{digest} {hashlib.sha256(f'{note.name} {digest}'.encode()).hexdigest()}\n"
