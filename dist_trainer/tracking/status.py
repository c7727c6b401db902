"""status.json: the state of a run, for people, scripts and schedulers."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any, Literal

from dist_trainer.config.secrets import masked
from dist_trainer.storage.files import replace_or_overwrite
from dist_trainer.tracking.run_reader import STATUS_FILE, is_number, read_status

log = logging.getLogger(__name__)

State = Literal["running", "finished", "preempted", "failed"]

SECONDS_BETWEEN = 5.0
KEPT = ("best_step", "best_loss", "checkpoint_seconds", "restarts", "lost_steps")
"""Numbers that keep their last value, also over restarts, until they are given again."""

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
        kept = {key: before[key] if is_number(before.get(key)) else None for key in KEPT}
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


class StatusTracker:
    """Updates the step of a running run every few seconds; the rest is written by those who save, start and end the run."""

    def __init__(self, folder: Path, max_steps: int) -> None:
        self._folder, self._max_steps = folder, max_steps
        self._written = time.monotonic()

    def log(self, line: dict[str, Any]) -> None:
        """Write the line's step, unless the last write was a moment ago."""
        if time.monotonic() - self._written >= SECONDS_BETWEEN:
            self._written = time.monotonic()
            write_status(self._folder, "running", step=line["step"], max_steps=self._max_steps, durable=False)

    def sync(self) -> None:
        """Nothing: the next start does not rely on it."""

    def close(self, *, state: str, reason: str | None) -> None:
        """Nothing."""
