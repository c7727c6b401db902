"""A run's folder: locked, checked, cleaned up, and archived if a new run replaces it. Only rank 0 has one."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from dist_trainer.checkpoint.state import Progress
from dist_trainer.config.paths import CHECKPOINTS, RUN_CONFIG, STATUS_FILE
from dist_trainer.errors import CheckpointError, ConfigError
from dist_trainer.html_report.page import REPORT_FILE
from dist_trainer.storage.files import replace_file, sync
from dist_trainer.storage.folders import make_folder, quarantine, remove_stale
from dist_trainer.storage.locks import LOCK_FILE, RunLock
from dist_trainer.tracking.run_reader import METRICS_FILE

log = logging.getLogger(__name__)

FILES = (RUN_CONFIG, METRICS_FILE, STATUS_FILE, REPORT_FILE)
FOLDERS = (CHECKPOINTS, "logs", "wandb", "tensorboard", "trackio")
WANDB_FILES = ("run_id", "cursor.json", "logged.json", "wandb", "wandb/logs", "artifacts")
"""The files in wandb/ that the next start opens again; W&B's links to its newest files are not among them."""
ARCHIVE_PREFIX, OLD_ARCHIVE_PREFIX = "archived-", "replaced-"
"""Name prefixes of folders with earlier runs: since version 0.1, and before."""
_MOVING = ".moving-aside"


class RunFolder:
    """OUTPUT_DIR/RUN_NAME, locked against other jobs for as long as this process lives."""

    def __init__(self, path: Path) -> None:
        """Create and lock the folder, check its content, and remove what a killed run left.

        Raises ConfigError if it cannot be written; CheckpointError that names the owner if another job holds it, or a symbolic
        link that leads out of it.
        """
        self.path = path
        self.is_new = False
        """Whether this process has created it and not used it yet, so that it may be deleted."""
        self.is_to_be_archived = False
        """Whether it contains an earlier run that will be archived and must not be changed before."""
        self.progress: Progress | None = None
        """The run's progress, once a valid checkpoint has been found."""
        existed = path.exists()
        with self._writing("choose another --output_dir"):
            make_folder(path)
            self._lock = RunLock(path)
        try:
            # Only valid under the lock: another job may have created and used the folder since `existed` was determined.
            self.is_new = not existed and not self._entries()
            with self._writing("choose another --output_dir"):
                self._reject_symlinks()
                for folder in (self.path, self.path / "wandb"):
                    remove_stale(folder)
                self._finish_archiving()
                make_folder(self.checkpoints)
        except BaseException:
            self.close(unused=True)
            raise

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def close(self, *, unused: bool = False) -> None:
        """Release the lock; a new folder is deleted if `unused`."""
        if unused and self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def write_config(self, text: str) -> None:
        """Write the resolved config. Raises ConfigError if that fails."""
        path = self.path / RUN_CONFIG
        with self._writing("free some space, or choose another --output_dir"):
            if not path.is_file() or path.read_bytes() != text.encode():
                replace_file(path, [text.encode()], durable=True)

    def archive_run(self) -> None:
        """Move an earlier run into a numbered folder inside; nothing is deleted.

        It is first collected under a hidden name. If this process is killed meanwhile, the next start finishes the move;
        otherwise half of the old run could be taken for the new one.
        """
        with self._writing("free some space, or choose another --run_name"):
            if any(not path.is_dir() or any(path.iterdir()) for path in self._entries()):
                (self.path / _MOVING).mkdir()
                self._finish_archiving()
            make_folder(self.checkpoints)
        self.is_to_be_archived = False

    def _finish_archiving(self) -> None:
        moving = self.path / _MOVING
        if not os.path.lexists(moving):
            return
        for entry in self._entries():
            entry.rename(moving / entry.name)
        names = (self.path / f"{ARCHIVE_PREFIX}{number}" for number in itertools.count(1))
        archive = next(name for name in names if not os.path.lexists(name))
        moving.rename(archive)
        sync(self.path)
        log.info("moved the earlier run to %s", archive)

    def _entries(self) -> list[Path]:
        """Files and folders of the run itself."""
        kept, archives = (LOCK_FILE, _MOVING), (ARCHIVE_PREFIX, OLD_ARCHIVE_PREFIX)
        return [path for path in self.path.iterdir() if path.name not in kept and not path.name.startswith(archives)]

    def _reject_symlinks(self) -> None:
        """The folder's creator must not be able to make us write, or block, somewhere else."""
        for name in (*FILES, *FOLDERS, _MOVING, *(f"wandb/{name}" for name in WANDB_FILES)):
            _reject_symlink(self.path / name)
        for name in FILES:
            _expect(self.path / name, stat.S_ISREG)
        for name in FOLDERS:
            _expect(self.path / name, stat.S_ISDIR)
        logs = self.path / "logs"
        for path in list(logs.iterdir()) if logs.is_dir() else []:
            _reject_symlink(path)
            _expect(path, stat.S_ISREG)

    @contextmanager
    def _writing(self, remedy: str) -> Generator[None]:
        try:
            yield
        except OSError as error:
            path = error.filename if isinstance(error.filename, str) else self.path
            raise ConfigError(f"output_dir, run_name: {path} cannot be written ({error.strerror}); {remedy}") from error


def _reject_symlink(path: Path) -> None:
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a symbolic link (to {os.readlink(path)}), and no link is followed inside a run's folder; "
            "remove it, or choose another --output_dir"
        )


def _expect(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Rename anything of the wrong kind under the name of a file or folder, such as a pipe, on which a reader would block."""
    if path.exists() and not is_kind(path.stat().st_mode):
        quarantine(path)
