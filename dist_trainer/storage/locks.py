"""File locks, which are released when their process ends; and the lock of a run's folder, which also names its owner."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from dist_trainer.errors import CheckpointError
from dist_trainer.storage.files import REFUSED, warn_once
from dist_trainer.storage.processes import is_running

log = logging.getLogger(__name__)

NO_LOCKS = (REFUSED | {errno.ENOLCK}) - {errno.EACCES}
"""Errors of file systems without locks. EACCES: another process holds the lock."""
LOCK_FILE = ".lock"
ALIVE_OWNER_SECONDS = 1.5
"""How long to wait for an owner that is running: one that was just killed may still look so while its memory is freed."""
DEAD_OWNER_SECONDS = 5.0
_POLL_SECONDS = 0.1
_OWNER = re.compile(r"host (?P<host>.*), pid (?P<pid>\d+), since (?P<since>.*)\n")

_held: set[int] = set()


def _unlock_in_child() -> None:
    """A forked child shares its parent's locks: a data worker that outlives a killed trainer would keep them."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_unlock_in_child)


def try_lock(path: Path) -> int | None:
    """Lock the file `path`, created if missing, exclusively. Returns a descriptor for `unlock`, or None if another process
    holds the lock.

    Raises OSError, also if `path` is a symbolic link or (see NO_LOCKS) the file system has no locks.
    """
    file = _open(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_same_file(path, file):
            return file
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            unlock(file)
            raise
    unlock(file)  # the file was deleted in the meantime, maybe with its folder
    return None


def unlock(file: int) -> None:
    """Release the lock."""
    _held.discard(file)
    os.close(file)


@contextlib.contextmanager
def locked(path: Path, *, without_locks: str) -> Generator[None]:
    """Hold the lock on the file `path`, after waiting for it.

    If the file system has no locks, continue without, and warn of the consequence, `without_locks`. Raises OSError.
    """
    try:
        while (file := try_lock(path)) is None:
            time.sleep(_POLL_SECONDS)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn_once(path.parent, "locks are", error, without_locks)
        yield
        return
    try:
        yield
    finally:
        unlock(file)


@dataclass(frozen=True)
class Owner:
    """Who holds, or held, the lock of a run."""

    host: str
    pid: int
    since: str

    @staticmethod
    def this_process() -> Owner:
        """This process, from now on."""
        return Owner(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @staticmethod
    def read(path: Path) -> Owner | None:
        """The owner that the lock file names; None if it names none."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            match = _OWNER.match(os.pread(file, 4096, 0).decode(errors="replace"))
        finally:
            os.close(file)
        return None if match is None else Owner(match["host"], int(match["pid"]), match["since"])

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}"

    def is_on_this_host(self) -> bool:
        """Whether its pid is valid on this host."""
        return self.host == socket.gethostname()

    def seems_alive(self) -> bool:
        """Whether it is running; assumed if it is on another host."""
        return not self.is_on_this_host() or is_running(self.pid)


class RunLock:
    """The lock of the run folder `folder`, held until `release` or the end of this process, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take it. Raises CheckpointError naming the owner if another job holds it, OSError if the file cannot be created."""
        self._path = folder / LOCK_FILE
        if self._path.is_symlink():
            raise CheckpointError(f"{self._path} is a symbolic link, which is not followed; remove it")
        self._file = self._lock()
        self._sign()

    def release(self) -> None:
        """Release the lock."""
        unlock(self._file)

    def _lock(self) -> int:
        started = time.monotonic()
        while True:
            try:
                file = try_lock(self._path)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                return self._without_locks()
            if file is not None:
                return file
            owner = Owner.read(self._path)
            patience = ALIVE_OWNER_SECONDS if owner is None or owner.seems_alive() else DEAD_OWNER_SECONDS
            if time.monotonic() - started > patience:
                raise self._in_use(owner)
            time.sleep(_POLL_SECONDS)

    def _without_locks(self) -> int:
        """On a file system without locks, only check that the owner is not another process on this machine."""
        owner = Owner.read(self._path)
        if owner is not None and owner.is_on_this_host() and owner.seems_alive() and owner.pid != os.getpid():
            raise self._in_use(owner)
        log.warning(
            "%s: this file system has no locks; a second job on the same folder is only noticed on this machine",
            self._path.parent,
        )
        return _open(self._path)

    def _in_use(self, owner: Owner | None) -> CheckpointError:
        return CheckpointError(
            f"{self._path.parent} is in use by another job ({owner or 'owner unknown'}); wait for it, stop it, "
            "or choose another --run_name"
        )

    def _sign(self) -> None:
        """Overwrite the previous owner, so that a reader always finds one. On a full disk only the name is lost."""
        text = f"{Owner.this_process()}\n".encode()
        try:
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))
        except OSError as error:
            log.warning("%s could not be written: %s", self._path, error.strerror)


def _open(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    _held.add(file)
    return file


def _is_same_file(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except OSError:
        return False
