"""metrics.jsonl: the authoritative log of a run, one JSON object per line."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_trainer.storage.files import open_for_writing, replace_file, sync_file, sync_folder, truncate_file
from dist_trainer.tracking.run_reader import METRICS_FILE, parse_line

log = logging.getLogger(__name__)

_encode = json.JSONEncoder(allow_nan=False).encode
_MAX_PENDING_LINES = 100_000
"""Lines kept in memory while the disk refuses them; beyond that the oldest are dropped."""


class JsonlTracker:
    """Appends each line with one write, so that a killed process leaves complete lines; on resume, drops later lines.

    A validation or sample at the step of the resume may be in the file already, if the earlier process was killed before it
    could save a checkpoint after it. It is repeated but not written again.

    Floats round-trip exactly. JSON has no NaN or infinity: such a value becomes null, and `non_finite` names it:
    `{"loss": null, "non_finite": {"loss": "nan"}}`.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        """Open the file of the run in `folder`, truncated to `start_step`; if that fails, each line tries again."""
        self._path = folder / METRICS_FILE
        self._start_step = start_step
        self._file: int | None = None
        self._size = 0
        """Bytes of complete lines."""
        self._kinds_at_start: set[str] = set()
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING_LINES)
        self._lock = threading.Lock()
        try:
            self._open()
        except OSError as error:
            log.warning("%s cannot be written yet (%s); its lines are kept in memory", self._path, error.strerror)

    def log(self, line: dict[str, Any]) -> None:
        """Append `line`. Raises OSError if writing fails; the next line tries again."""
        with self._lock:
            if line["step"] == self._start_step and self._file is not None and line["kind"] in self._kinds_at_start:
                return
            self._pending.append(encode_line(line))
            self._write_pending()

    def sync(self) -> None:
        """Return when all lines so far are on disk; lines that are logged meanwhile do not wait."""
        with self._lock:
            file = self._write_pending()
        sync_file(file, self._path)

    def close(self, *, state: str, reason: str | None) -> None:
        """Write what is pending and close the file."""
        try:
            self.sync()
        finally:
            if self._file is not None:
                os.close(self._file)

    def _open(self) -> int:
        if self._file is None:
            self._kinds_at_start = _truncate_to_step(self._path, self._start_step)
            self._file = open_for_writing(self._path, append=True)
            self._size = os.fstat(self._file).st_size
            sync_folder(self._path.parent)
        return self._file

    def _write_pending(self) -> int:
        file = self._open()
        while self._pending:
            data = self._pending[0]
            try:
                written = os.write(file, data)
                while written < len(data):
                    written += os.write(file, data[written:])
            except OSError:
                # Part of a line may have been written: the next try starts after the last complete one.
                os.ftruncate(file, self._size)
                raise
            self._size += len(data)
            self._pending.popleft()
        return file


def encode_line(line: dict[str, Any]) -> bytes:
    """`line` as one line of JSON, with null for NaN and infinity."""
    try:
        text = _encode(line)
    except ValueError:
        non_finite = {k: repr(v) for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
        text = _encode({**line, **dict.fromkeys(non_finite), "non_finite": non_finite})
    return text.encode() + b"\n"


def _truncate_to_step(path: Path, start_step: int) -> set[str]:
    """Drop lines past `start_step`, duplicates, and invalid or incomplete lines; returns the kinds of the lines of
    `start_step` itself.

    If all of these are at the end, the file is truncated, which needs no disk space; otherwise it is replaced.
    """
    if not path.exists():
        return set()
    seen: set[tuple[str, int]] = set()
    size_before = path.stat().st_size
    leading = kept = 0
    is_leading = True
    for line in _lines_to_keep(path, start_step, seen):
        is_leading = is_leading and line is not None
        size = len(line or b"")
        kept += size
        leading += size if is_leading else 0
    if kept > leading:
        replace_file(path, filter(None, _lines_to_keep(path, start_step, set())), durable=True)
    elif size_before > kept:
        truncate_file(path, kept)
    if start_step and size_before > kept:
        log.info("%s was truncated to step %d", path, start_step)
    return {kind for kind, step in seen if step == start_step}


def _lines_to_keep(path: Path, start_step: int, seen: set[tuple[str, int]]) -> Iterator[bytes | None]:
    """Each line; None for one to drop. The kind and step of each are added to `seen`."""
    with path.open("rb") as file:
        for line in file:
            fields = parse_line(line) if line.endswith(b"\n") else None
            identity = (fields["kind"], fields["step"]) if fields else None
            drop = identity is None or identity[1] > start_step or identity in seen
            if identity is not None:
                seen.add(identity)
            yield None if drop else line
