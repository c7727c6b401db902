"""metrics.jsonl: the truth of what happened in a run, one JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_trainer.tracking.atomic_file import replace_file
from dist_trainer.tracking.run_context import METRICS_FILE, RunContext

log = logging.getLogger(__name__)

_encode = json.JSONEncoder(allow_nan=False).encode
_KEPT_WHILE_DISK_IS_FULL = 100_000
"""Lines kept in memory while the disk refuses them; the oldest go first beyond that."""


class JsonlTracker:
    """Appends a line with one write, so that a killed process leaves whole lines; on resume, drops what comes after.

    Floats read back exactly (shortest digits that do). JSON has no NaN and no infinity: such a value is null, and the
    line's `non_finite` names it: `{"loss": null, "non_finite": {"loss": "nan"}}`.
    """

    def __init__(self, context: RunContext) -> None:
        """Open the file, rewound to `start_step`; raises OSError where the folder cannot be written."""
        self._path = context.folder / METRICS_FILE
        _rewind(self._path, context.start_step)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._good_bytes = os.fstat(self._file).st_size
        self._pending: deque[bytes] = deque(maxlen=_KEPT_WHILE_DISK_IS_FULL)

    def log(self, line: dict[str, Any]) -> None:
        """Append `line`; raises OSError where the disk refuses, and tries again with the next line."""
        self._pending.append(encode_line(line))
        self._write_pending()

    def sync(self) -> None:
        """Return when all lines are on the disk."""
        self._write_pending()
        os.fsync(self._file)

    def close(self, *, state: str, reason: str | None) -> None:
        """Write what is left and close the file."""
        try:
            self.sync()
        finally:
            os.close(self._file)

    def _write_pending(self) -> None:
        while self._pending:
            data = self._pending[0]
            try:
                written = os.write(self._file, data)
                while written < len(data):
                    written += os.write(self._file, data[written:])
            except OSError:
                # A part of a line may stand there now: the next try begins where the last whole line ended.
                os.ftruncate(self._file, self._good_bytes)
                raise
            self._good_bytes += len(data)
            self._pending.popleft()


def encode_line(line: dict[str, Any]) -> bytes:
    """`line` as one line of JSON, with null for what is not finite."""
    try:
        text = _encode(line)
    except ValueError:
        non_finite = {k: repr(v) for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
        text = _encode({**line, **dict.fromkeys(non_finite), "non_finite": non_finite})
    return text.encode() + b"\n"


def _rewind(path: Path, start_step: int) -> None:
    """Drop lines past `start_step`, and what is no line of ours, such as the half of one; by an atomic replacement."""
    if not path.exists() or path.stat().st_size == 0:
        return
    if start_step == 0:
        replace_file(path, (), durable=True)
        return
    size = path.stat().st_size
    if sum(map(len, _lines_up_to(path, start_step))) < size:
        replace_file(path, _lines_up_to(path, start_step), durable=True)
        log.info("%s was taken back to step %d", path, start_step)


def _lines_up_to(path: Path, start_step: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            step = _step_of(line)
            if step is not None and step <= start_step:
                yield line


def _step_of(line: bytes) -> int | None:
    """The step of a whole line; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
