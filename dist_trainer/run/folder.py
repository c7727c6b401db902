"""A run's folder: whose it is, what it is, and how it stands. Only rank 0 holds one."""

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
from dist_trainer.errors import CheckpointError, ConfigError
from dist_trainer.storage.files import replace_file, sync
from dist_trainer.storage.folders import make_folder, quarantine, remove_stale
from dist_trainer.storage.locks import LOCK_FILE, RunLock

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
FILES = (CONFIG_FILE, "metrics.jsonl", "status.json", "report.html")
CHECKPOINTS = "checkpoints"
FOLDERS = (CHECKPOINTS, "logs", "wandb", "tensorboard", "trackio")
WANDB_FILES = ("run_id", "cursor.json", "logged.json", "wandb", "wandb/logs", "artifacts")
"""Of wandb/, what is opened again at the next start; W&B's own links to its newest files are not."""
ARCHIVE_PREFIX, OLD_ARCHIVE_PREFIX = "archived-", "replaced-"
"""Of folders with earlier runs: since version 0.1, and before."""
_MOVING = ".moving-aside"


class RunFolder:
    """OUTPUT_DIR/RUN_NAME, locked against other jobs for as long as this process lives."""

    def __init__(self, path: Path) -> None:
        """Create and lock the folder, see that what stands in it is what belongs there, and sweep what a killed run left.

        Raises ConfigError where it cannot be written, CheckpointError naming the owner where another job holds it, or the
        link where one leads out of it.
        """
        self.path = path
        self.is_new = False
        """Whether nothing has been here before, nor has happened since: then nothing is lost where it goes."""
        self.is_to_be_replaced = False
        """Whether what stands here is an earlier run that is to be set aside, and is not to be touched before."""
        self.progress: Progress | None = None
        """How far the run is, once an intact checkpoint has told."""
        was_there = path.exists()
        with self._writing("choose another --output_dir"):
            make_folder(path)
            self._lock = RunLock(path)
        try:
            # Only the lock tells: another job may have made the folder, and have run in it, since we looked.
            self.is_new = not was_there and not self._of_the_run()
            with self._writing("choose another --output_dir"):
                self._guard_doors()
                for folder in (self.path, self.path / "wandb"):
                    remove_stale(folder)
                self._finish_setting_aside()
                make_folder(self.checkpoints)
        except BaseException:
            self.close(unused=True)
            raise

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / CHECKPOINTS

    def close(self, *, unused: bool = False) -> None:
        """Give the folder free; a new one that stayed `unused` goes."""
        if unused and self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def write_config(self, text: str) -> None:
        """Keep the resolved config. Raises ConfigError where the disk refuses."""
        path = self.path / CONFIG_FILE
        with self._writing("make room, or choose another --output_dir"):
            if not path.is_file() or path.read_bytes() != text.encode():
                replace_file(path, [text.encode()], durable=True)

    def set_aside(self) -> None:
        """Move what an earlier run left into a numbered folder inside; nothing is deleted.

        It is gathered under a hidden name first: what was begun and killed here is finished at the next start, or half of
        that run could be taken for the new one.
        """
        with self._writing("make room, or choose another --run_name"):
            if any(not path.is_dir() or any(path.iterdir()) for path in self._of_the_run()):
                (self.path / _MOVING).mkdir()
                self._finish_setting_aside()
            make_folder(self.checkpoints)
        self.is_to_be_replaced = False

    def _finish_setting_aside(self) -> None:
        moving = self.path / _MOVING
        if not os.path.lexists(moving):
            return
        for leftover in self._of_the_run():
            leftover.rename(moving / leftover.name)
        names = (self.path / f"{ARCHIVE_PREFIX}{number}" for number in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        moving.rename(aside)
        sync(self.path)
        log.info("an earlier run was set aside into %s", aside)

    def _of_the_run(self) -> list[Path]:
        kept = (LOCK_FILE, _MOVING)
        archives = (ARCHIVE_PREFIX, OLD_ARCHIVE_PREFIX)
        return [p for p in self.path.iterdir() if p.name not in kept and not p.name.startswith(archives)]

    def _guard_doors(self) -> None:
        """Whoever made this folder must not have made us write, or wait, somewhere else."""
        for name in (*FILES, *FOLDERS, _MOVING, *(f"wandb/{name}" for name in WANDB_FILES)):
            _refuse_link(self.path / name)
        for name in FILES:
            _expect(self.path / name, stat.S_ISREG)
        for name in FOLDERS:
            _expect(self.path / name, stat.S_ISDIR)
        logs = self.path / "logs"
        for path in list(logs.iterdir()) if logs.is_dir() else []:
            _refuse_link(path)
            _expect(path, stat.S_ISREG)

    @contextmanager
    def _writing(self, remedy: str) -> Generator[None]:
        try:
            yield
        except OSError as error:
            named = error.filename if isinstance(error.filename, str) else self.path
            raise ConfigError(f"output_dir, run_name: {named} cannot be written ({error.strerror}); {remedy}") from error


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a symbolic link (to {os.readlink(path)}), and no link is followed inside a run's folder; "
            "remove it, or choose another --output_dir"
        )


def _expect(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Rename what stands under the name of a file or a folder and is none, such as a pipe, which would be waited at."""
    if path.exists() and not is_kind(path.stat().st_mode):
        quarantine(path)
