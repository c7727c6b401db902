"""The state of a run, for people, scripts and schedulers: status.json, logs/events.jsonl (when it started, resumed, ended)
and logs/progress (how many steps it has finished).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, Literal

from dist_trainer.config.paths import STATUS_FILE
from dist_trainer.config.secrets import masked
from dist_trainer.storage.files import open_for_writing, replace_or_overwrite, sync_file, sync_folder
from dist_trainer.tracking.run_reader import (
    DIGITS_OF_A_STEP,
    EVENTS_FILE,
    PROGRESS_FILE,
    is_number,
    read_events,
    read_status,
)

log = logging.getLogger(__name__)

FIRST_CHECKPOINT = "first checkpoint"
State = Literal["running", "finished", "preempted", "failed"]

SECONDS_BETWEEN = 5.0
KEPT = ("best_step", "best_loss", "checkpoint_seconds", "digest", "digest_step", "restarts", "lost_steps")
"""They keep their last value, also over restarts, until they are given again."""

_DIGEST = re.compile(r"[0-9a-f]{64}")

_write_lock = threading.Lock()


def write_status(
    folder: Path,
    state: State,
    *,
    step: int,
    max_steps: int | None,
    durable: bool = True,
    is_last: bool = False,
    **metadata: Any,
) -> None:
    """Replace the status of the run in `folder`, carrying over KEPT values that `metadata` lacks.

    Never stops a run: on a full disk the file is overwritten in place.

    `is_last`: this process ends here; its other threads wait forever instead of writing another status.
    """
    _write_lock.acquire()
    try:
        before = read_status(folder)
        kept = {key: before[key] if is_number(before.get(key)) or _is_digest(before.get(key)) else None for key in KEPT}
        _replace(folder, {"state": state, "step": step, "max_steps": max_steps, **kept, **metadata}, durable=durable)
    finally:
        if not is_last:
            _write_lock.release()


def amend_status(folder: Path, **metadata: Any) -> None:
    """Change `metadata` in the status of the run in `folder`, if it has one."""
    with _write_lock:
        if status := read_status(folder):
            _replace(folder, {**status, **metadata}, durable=False)


def _replace(folder: Path, status: dict[str, Any], *, durable: bool) -> None:
    text = masked(json.dumps({**status, "time": time.time()}, indent=2))
    try:
        replace_or_overwrite(folder / STATUS_FILE, text.encode() + b"\n", durable=durable)
    except OSError as error:
        log.warning("%s could not be written: %s", folder / STATUS_FILE, error.strerror)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


class StatusTracker:
    """Updates the step of a running run, and the digest of its weights, every few seconds; the rest is written by those who
    save, start and end the run.
    """

    def __init__(self, folder: Path, max_steps: int) -> None:
        self._folder, self._max_steps = folder, max_steps
        self._written = self._digest_written = time.monotonic()

    def log(self, line: dict[str, Any]) -> None:
        """Write the line's step, or digest, unless the last write of one was a moment ago."""
        if line["kind"] == "digest":  # it comes from a thread, later than other lines of its step
            if time.monotonic() - self._digest_written >= SECONDS_BETWEEN:
                self._digest_written = time.monotonic()
                amend_status(self._folder, digest=line["digest"], digest_step=line["step"])
        elif time.monotonic() - self._written >= SECONDS_BETWEEN:
            self._written = time.monotonic()
            write_status(self._folder, "running", step=line["step"], max_steps=self._max_steps, durable=False)

    def close(self, *, state: str, reason: str | None) -> None:
        """Does nothing."""


def has_saved(folder: Path) -> bool:
    """Whether the run in `folder` has ever saved a checkpoint, by its events."""
    return any(event["event"] == FIRST_CHECKPOINT for event in read_events(folder))


def append_event(folder: Path, event: str, *, step: int, durable: bool = False, **metadata: Any) -> None:
    """Append `event` (start, resume, first checkpoint, or how the run ended) to the events of the run in `folder`.

    The file only grows; resuming removes nothing from it. Never stops a run. `durable`: the event must survive a power cut. If
    a killed process left the last line incomplete, that line is terminated first, so that this one stays readable.
    """
    line = masked(json.dumps({"event": event, "step": step, "time": time.time(), **metadata}, default=str)).encode() + b"\n"
    path = folder / EVENTS_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_for_writing(path, append=True)
        try:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            os.write(file, b"\n" + line if torn else line)
            if durable:
                sync_file(file, path)
                sync_folder(path.parent)
        finally:
            os.close(file)
    except OSError as error:
        log.warning("%s could not be written: %s", path, error.strerror)


class StepCounter:
    """Records each finished step in logs/progress, since metrics.jsonl has only every few steps.

    It overwrites a few bytes, which takes about a microsecond; a killed process leaves a complete number.
    """

    def __init__(self, folder: Path) -> None:
        """Open the file of the run in `folder`; if that fails, there is one warning."""
        self._file: int | None = None
        path = folder / PROGRESS_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_for_writing(path)
        except OSError as error:
            self._give_up(error)

    def record(self, step: int) -> None:
        """Record that `step` steps are finished."""
        if self._file is not None:
            try:
                os.pwrite(self._file, b"%*d\n" % (DIGITS_OF_A_STEP, step), 0)
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # a network file system may report only now that the disk is full
                os.close(file)

    def _give_up(self, error: OSError) -> None:
        log.warning("%s could not be written (%s); lost_steps will count logged steps only", PROGRESS_FILE, error.strerror)
        self.close()
