"""metrics.jsonl: the truth of what happened in a run, one JSON object a line."""

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

from dist_trainer.storage.atomic_file import replace_file
from dist_trainer.storage.files import sync_file, sync_folder
from dist_trainer.tracking.run_context import METRICS_FILE, RunContext

log = logging.getLogger(__name__)

_encode = json.JSONEncoder(allow_nan=False).encode
_KEPT_WHILE_DISK_IS_FULL = 100_000
"""Lines kept in memory while the disk refuses them; the oldest go first beyond that."""


class JsonlTracker:
    """Appends a line with one write, so that a killed process leaves whole lines; on resume, drops what comes after.

    What is made up for at the step of a resume (a validation, a sample) may stand there already, from a life that was killed
    before it could save that: then it is not written again.

    Floats read back exactly (shortest digits that do). JSON has no NaN and no infinity: such a value is null, and the
    line's `non_finite` names it: `{"loss": null, "non_finite": {"loss": "nan"}}`.
    """

    def __init__(self, context: RunContext) -> None:
        """Open the file, rewound to `start_step`; where the disk refuses that, it is tried again with each line."""
        self._path = context.folder / METRICS_FILE
        self._start_step = context.start_step
        self._file: int | None = None
        self._good_bytes = 0
        self._kinds_at_start: set[str] = set()
        self._pending: deque[bytes] = deque(maxlen=_KEPT_WHILE_DISK_IS_FULL)
        self._writing = threading.Lock()
        try:
            self._open()
        except OSError as error:
            log.warning("%s cannot be written yet (%s); its lines are kept in memory", self._path, error.strerror)

    def log(self, line: dict[str, Any]) -> None:
        """Append `line`; raises OSError where the disk refuses, and tries again with the next line."""
        with self._writing:
            if line["step"] == self._start_step and self._file is not None and line["kind"] in self._kinds_at_start:
                return
            self._pending.append(encode_line(line))
            self._write_pending()

    def sync(self) -> None:
        """Return when all lines are on the disk; those that come meanwhile do not wait for it."""
        with self._writing:
            file = self._write_pending()
        sync_file(file, self._path)

    def close(self, *, state: str, reason: str | None) -> None:
        """Write what is left and close the file."""
        try:
            self.sync()
        finally:
            if self._file is not None:
                os.close(self._file)

    def _open(self) -> int:
        """The file, opened, and rewound before anything is added to it."""
        if self._file is None:
            self._kinds_at_start = _rewind(self._path, self._start_step)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            self._good_bytes = os.fstat(self._file).st_size
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
                # A part of a line may stand there now: the next try begins where the last whole line ended.
                os.ftruncate(file, self._good_bytes)
                raise
            self._good_bytes += len(data)
            self._pending.popleft()
        return file


def encode_line(line: dict[str, Any]) -> bytes:
    """`line` as one line of JSON, with null for what is not finite."""
    try:
        text = _encode(line)
    except ValueError:
        non_finite = {k: repr(v) for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
        text = _encode({**line, **dict.fromkeys(non_finite), "non_finite": non_finite})
    return text.encode() + b"\n"


def _rewind(path: Path, start_step: int) -> set[str]:
    """Drop lines past `start_step`, lines that stand twice, and what is no line of ours, such as the half of one; the kinds of
    those of `start_step` itself.

    What is to be dropped is mostly the end, which is cut off: that needs no room on the disk. Else by an atomic replacement.
    """
    if not path.exists():
        return set()
    seen: set[tuple[str, int]] = set()
    size_before = path.stat().st_size
    beginning = kept = 0
    is_beginning = True
    for line in _lines_up_to(path, start_step, seen):
        is_beginning = is_beginning and line is not None
        size = len(line or b"")
        kept += size
        beginning += size if is_beginning else 0
    if kept > beginning:
        replace_file(path, filter(None, _lines_up_to(path, start_step, set())), durable=True)
    elif path.stat().st_size > kept:
        _cut_off(path, kept)
    if start_step and path.stat().st_size < size_before:
        log.info("%s was taken back to step %d", path, start_step)
    return {kind for kind, step in seen if step == start_step}


def _cut_off(path: Path, size: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.ftruncate(file, size)
        sync_file(file, path)
    finally:
        os.close(file)


def _lines_up_to(path: Path, start_step: int, seen: set[tuple[str, int]]) -> Iterator[bytes | None]:
    """Each line; None in place of one that is to be dropped. Kind and step of each are added to `seen`."""
    with path.open("rb") as file:
        for line in file:
            identity = _kind_and_step(line)
            drop = identity is None or identity[1] > start_step or identity in seen
            if identity is not None:
                seen.add(identity)
            yield None if drop else line


def _kind_and_step(line: bytes) -> tuple[str, int] | None:
    """Of a whole line; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
        kind, step = found["kind"], found["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (kind, step) if isinstance(kind, str) and type(step) is int and step > 0 else None
