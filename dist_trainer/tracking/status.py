"""status.json: how a run stands, for people, scripts and schedulers."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any, Literal

from dist_trainer.config.secrets import masked
from dist_trainer.storage.atomic_file import replace_or_overwrite
from dist_trainer.tracking.lenient_json import is_number, parse_object, text_of
from dist_trainer.tracking.run_context import RunContext

log = logging.getLogger(__name__)

State = Literal["running", "finished", "preempted", "failed"]

STATUS_FILE = "status.json"
SECONDS_BETWEEN = 5.0
KEPT = ("best_step", "best_loss", "checkpoint_seconds", "restarts", "lost_steps")
"""Numbers that stay as they stand until someone knows better, also over restarts."""

_one_at_a_time = threading.Lock()


def read_status(folder: Path) -> dict[str, Any]:
    """What the status of the run in `folder` says; empty where there is none to be read."""
    return parse_object(text_of(folder / STATUS_FILE)) or {}


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
    """Replace the status of the run in `folder`, but for what `facts` leave out of KEPT; never stops a run where the disk is
    full, and tells the truth even then.

    `is_last`: this process ends here; what else still runs in it must wait for that, and may write no other status.
    """
    _one_at_a_time.acquire()
    try:
        before = read_status(folder)
        kept = {key: before[key] if is_number(before.get(key)) else None for key in KEPT}
        _replace(folder, {"state": state, "step": step, "max_steps": max_steps, **kept, **metadata}, durable=durable)
    finally:
        if not is_last:
            _one_at_a_time.release()


def amend_status(folder: Path, **metadata: Any) -> None:
    """Change `facts` in the status of the run in `folder`, if there is one."""
    with _one_at_a_time:
        if status := read_status(folder):
            _replace(folder, {**status, **metadata}, durable=False)


def _replace(folder: Path, status: dict[str, Any], *, durable: bool) -> None:
    text = masked(json.dumps({**status, "time": time.time()}, indent=2))
    try:
        replace_or_overwrite(folder / STATUS_FILE, text.encode() + b"\n", durable=durable)
    except OSError as error:
        log.warning("%s could not be written: %s", folder / STATUS_FILE, error.strerror)


class StatusTracker:
    """Keeps the step of a running run true to within seconds; who saves, begins and ends the run writes the rest."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._written = time.monotonic()

    def log(self, line: dict[str, Any]) -> None:
        """Note the line's step, if the last note is old."""
        if time.monotonic() - self._written < SECONDS_BETWEEN:
            return
        self._written = time.monotonic()
        context = self._context
        write_status(context.folder, "running", step=line["step"], max_steps=context.max_steps, durable=False)

    def sync(self) -> None:
        """Nothing: the next start does not rely on it."""

    def close(self, *, state: str, reason: str | None) -> None:
        """Nothing."""
