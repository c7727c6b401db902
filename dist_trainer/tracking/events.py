"""logs/events.jsonl: when a run started, resumed, ended; and logs/progress: how many steps it has finished."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from dist_trainer.config.secrets import masked
from dist_trainer.storage.files import open_for_writing, sync_file, sync_folder
from dist_trainer.tracking.run_reader import DIGITS_OF_A_STEP, EVENTS_FILE, PROGRESS_FILE

log = logging.getLogger(__name__)

FIRST_CHECKPOINT = "first checkpoint"


def append_event(folder: Path, event: str, *, step: int, durable: bool = False, **metadata: Any) -> None:
    """Append `event` (start, resume, first checkpoint, or how the run ended) to the events of the run in `folder`.

    The file only grows; resuming removes nothing from it. Never stops a run. `durable`: so that it survives a power cut. If a
    killed process left the last line incomplete, that line is closed first, so that this one stays readable.
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
    """Records each finished step in logs/progress, since metrics.jsonl has only every so many.

    One small write over the previous one, about a microsecond; a killed process leaves it complete.
    """

    def __init__(self, folder: Path) -> None:
        """Open the file of the run in `folder`; if the disk refuses, there is one warning."""
        self._file: int | None = None
        path = folder / PROGRESS_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_for_writing(path)
        except OSError as error:
            self._give_up(error)

    def record(self, step: int) -> None:
        """`step` steps are finished."""
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
