"""Configures logging: one file per rank in the run's folder, and the console."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from io import TextIOWrapper
from pathlib import Path

from tqdm import tqdm

from dist_trainer.config.secrets import masked
from dist_trainer.storage.files import open_for_writing

PACKAGE_LOGGER = "dist_trainer"
PROGRESS_LOGGER = "dist_trainer.progress"
"""Level of what the progress bar shows: it goes to the file, and to the console unless that is a terminal."""


def configure_logging(log_folder: Path | None, *, rank: int) -> None:
    """Send this package's messages to `log_folder`/rank-N.log and to stderr; without a folder, only to stderr.

    On the console, rank 0 shows all messages, other ranks only warnings, prefixed with the rank. Another call replaces the
    handlers of the previous one; other libraries' loggers are left alone. If the file cannot be written, there is one warning.
    """
    logger = logging.getLogger(PACKAGE_LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in [h for h in logger.handlers if isinstance(h, ConsoleHandler | RankFileHandler)]:
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # the last lines may not fit on the disk
            handler.close()
    logger.addHandler(ConsoleHandler(rank, is_terminal=sys.stderr.isatty()))
    if log_folder is not None:
        try:
            log_folder.mkdir(parents=True, exist_ok=True)
            logger.addHandler(RankFileHandler(log_folder / f"rank-{rank}.log"))
        except OSError as error:
            logger.warning("%s: no log file there (%s)", log_folder, error.strerror)


class ConsoleHandler(logging.Handler):
    """Writes to stderr, above the progress bar if there is one."""

    def __init__(self, rank: int, *, is_terminal: bool) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        # tqdm's default lock is shared with forked processes: one that is killed while it writes would hold it forever.
        tqdm.set_lock(threading.RLock())
        self._prefix = f"[rank {rank}] " if rank else ""
        self._with_time = not is_terminal
        if is_terminal:
            self.addFilter(lambda record: record.name != PROGRESS_LOGGER)

    def format(self, record: logging.LogRecord) -> str:
        """The message, with the time (unless on a terminal) and the level (for warnings and errors). Secrets are masked, since
        launchers write the console to files.
        """
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        time = f"{_TIME.formatTime(record, '%H:%M:%S')} " if self._with_time else ""
        return masked(f"{time}{self._prefix}{level}{_MESSAGE.format(record)}")

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a closed console is ignored."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except (OSError, ValueError):
            pass
        except Exception:
            self.handleError(record)


class RankFileHandler(logging.FileHandler):
    """Appends to a file, never through a symlink. A full disk is ignored; pending records are written once there is space."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))

    def _open(self) -> TextIOWrapper:
        file = open_for_writing(Path(self.baseFilename), append=True)
        return open(file, "a", encoding=self.encoding, errors=self.errors)

    def format(self, record: logging.LogRecord) -> str:
        """The line, with secrets masked: messages of libraries may contain addresses with passwords."""
        return masked(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the record silently."""


_TIME = logging.Formatter()
_MESSAGE = logging.Formatter("%(message)s")
