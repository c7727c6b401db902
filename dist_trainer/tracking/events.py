"""logs/events.jsonl: when a run started, resumed, ended. Only grows; resuming rewinds nothing."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from dist_trainer.config.secrets import masked
from dist_trainer.storage.files import sync_file, sync_folder

log = logging.getLogger(__name__)

EVENTS_FILE = "logs/events.jsonl"
FIRST_CHECKPOINT = "first checkpoint"


def append_event(folder: Path, event: str, *, step: int, durable: bool = False, **metadata: Any) -> None:
    """Append `event` (start, resume, first checkpoint, or how the run ended) of the run in `folder`; never stops a run.

    `durable`: so that it survives a power cut. A last line that a killed process left half-written is closed first, so that
    it damages no line but itself.
    """
    line = masked(json.dumps({"event": event, "step": step, "time": time.time(), **metadata}, default=str)).encode() + b"\n"
    path = folder / EVENTS_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
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
