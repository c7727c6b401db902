"""status.json: how a run stands, for people, scripts and schedulers."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Literal

from dist_trainer.tracking.atomic_file import replace_or_overwrite
from dist_trainer.tracking.run_context import RunContext
from dist_trainer.tracking.secrets import masked

log = logging.getLogger(__name__)

State = Literal["running", "finished", "preempted", "failed"]

STATUS_FILE = "status.json"
SECONDS_BETWEEN = 5.0


def write_status(folder: Path, state: State, *, step: int, max_steps: int | None, durable: bool = True, **facts: Any) -> None:
    """Replace the status of the run in `folder`; never stops a run where the disk is full, and
    tells the truth even then."""
    status = {"state": state, "step": step, "max_steps": max_steps, **facts, "time": time.time()}
    try:
        replace_or_overwrite(folder / STATUS_FILE, masked(json.dumps(status, indent=2)).encode() + b"\n", durable=durable)
    except OSError as error:
        log.warning("%s could not be written: %s", folder / STATUS_FILE, error.strerror)


class StatusTracker:
    """Keeps the step of a running run true to within seconds; who ends the run writes how it ended."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._written = time.monotonic()
        write_status(context.folder, "running", step=context.start_step, max_steps=context.max_steps)

    def log(self, line: dict[str, Any]) -> None:
        """Note the line's step, if the last note is old."""
        if time.monotonic() - self._written < SECONDS_BETWEEN:
            return
        self._written = time.monotonic()
        write_status(self._context.folder, "running", step=line["step"], max_steps=self._context.max_steps, durable=False)

    def sync(self) -> None:
        """Nothing: the next start does not read it."""

    def close(self, *, state: str, reason: str | None) -> None:
        """Nothing."""
