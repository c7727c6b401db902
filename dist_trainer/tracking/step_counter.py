"""logs/steps_done: how far a process has come, however it ends. Lines are logged only every so many steps."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from dist_trainer.tracking.lenient_json import text_of

log = logging.getLogger(__name__)

STEPS_FILE = "logs/steps_done"
_LONGEST_NUMBER = 15


class StepCounter:
    """Notes each step with one small write over the one before, which a killed process leaves whole (about a microsecond)."""

    def __init__(self, folder: Path) -> None:
        """That of the run in `folder`; where the disk has no room for it, one warning tells."""
        self._file: int | None = None
        path = folder / STEPS_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            self._give_up(error)

    def note(self, step: int) -> None:
        """`step` steps are done."""
        if self._file is not None:
            try:
                os.pwrite(self._file, b"%*d\n" % (_LONGEST_NUMBER, step), 0)
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """No more steps."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # file systems of a network may refuse only here what they had no room for
                os.close(file)

    def _give_up(self, error: OSError) -> None:
        log.warning("%s could not be written (%s); lost_steps will count logged steps alone", STEPS_FILE, error.strerror)
        self.close()


def steps_done(folder: Path) -> int:
    """The last step that was noted in `folder`; 0 where none was."""
    digits = text_of(folder / STEPS_FILE).strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= _LONGEST_NUMBER else 0
