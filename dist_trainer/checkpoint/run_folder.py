"""A run's folder: whose it is, what it is, and how it stands. Only rank 0 holds one."""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import shutil
import socket
import time
from pathlib import Path

from dist_trainer.checkpoint.storage import write_atomically
from dist_trainer.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
CONFIG_FILE = "config.yaml"


class RunFolder:
    """OUTPUT_DIR/RUN_NAME, locked against other jobs for as long as this process lives."""

    def __init__(self, path: Path) -> None:
        """Create and lock the folder.

        Raises ConfigError where it cannot be written, CheckpointError naming the owner where another job holds it.
        """
        self.path = path
        self.is_new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"output_dir, run_name: {path} cannot be written ({error.strerror}); choose another --output_dir"
            ) from error
        self._acquire()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._lock, 4096, 0).decode(errors="replace").strip()
            os.close(self._lock)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise CheckpointError(
                    f"{self.path} is in use by another job ({owner or 'owner unknown'}); wait for it, stop it, "
                    "or choose another --run_name"
                ) from error
            raise CheckpointError(f"{self.path} cannot be locked ({error.strerror})") from error
        owner = f"host {socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, owner.encode(), 0)

    def close(self, *, unused: bool = False) -> None:
        """Give the folder free; a new one that stayed `unused` goes."""
        if unused and self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def write_config(self, text: str) -> None:
        """Keep the resolved config. Raises ConfigError where the disk refuses."""
        try:
            write_atomically(self.path / CONFIG_FILE, text)
        except OSError as error:
            raise ConfigError(
                f"output_dir, run_name: {self.path / CONFIG_FILE} cannot be written ({error.strerror}); make room, "
                "or choose another --output_dir"
            ) from error

    def set_aside(self) -> None:
        """Move what an earlier run left into a numbered folder inside; nothing is deleted."""
        found = [path for path in self.path.iterdir() if path.name != LOCK_FILE and not path.name.startswith("replaced-")]
        leftovers = [path for path in found if not path.is_dir() or any(path.iterdir())]
        if not leftovers:
            return
        names = (self.path / f"replaced-{number}" for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        aside.mkdir()
        for leftover in leftovers:
            leftover.rename(aside / leftover.name)
        log.info("an earlier run was set aside into %s", aside)
