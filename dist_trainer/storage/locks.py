"""One job a run folder: a lock that ends with the process that holds it, and that tells who this is."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from dist_trainer.errors import CheckpointError
from dist_trainer.storage.files import NO_LOCKS

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
SECONDS_FOR_THE_LIVING = 1.5
"""A process that was killed a moment ago may still look alive while its memory is given back."""
SECONDS_FOR_THE_DEAD = 5.0
_PAUSE_SECONDS = 0.1
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_OWNER = re.compile(r"host (?P<host>.*), pid (?P<pid>\d+), since (?P<since>.*)\n")

_held: set[int] = set()


def _let_go_in_a_child() -> None:
    """A forked child shares its parent's locks: a data worker that outlives a killed trainer would keep them."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_a_child)


@dataclass(frozen=True)
class Owner:
    """Who holds, or held, the lock."""

    host: str
    pid: int
    since: str

    @staticmethod
    def this_process() -> Owner:
        """Since now."""
        return Owner(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @staticmethod
    def named_in(file: int) -> Owner | None:
        """Whom the lock file names; None where it names no one."""
        found = _OWNER.match(os.pread(file, 4096, 0).decode(errors="replace"))
        return None if found is None else Owner(found["host"], int(found["pid"]), found["since"])

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}"

    def is_on_this_host(self) -> bool:
        """Whether its pid means something here."""
        return self.host == socket.gethostname()

    def seems_to_live(self) -> bool:
        """Whether there is such a process; what is on another host seems to."""
        if not self.is_on_this_host():
            return True
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            return True
        except (OSError, OverflowError):
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return True
        return state not in "ZX"


class RunLock:
    """The lock of the run folder `folder`, held until `release` or the end of this process, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take it. Raises CheckpointError naming the owner where another job holds it, OSError where the file cannot be."""
        self._path = folder / LOCK_FILE
        if self._path.is_symlink():
            raise CheckpointError(f"{self._path} is a symbolic link, which is not followed; remove it")
        self._file = self._taken()
        _held.add(self._file)
        self._sign()

    def release(self) -> None:
        """Let others have it."""
        _held.discard(self._file)
        os.close(self._file)

    def _taken(self) -> int:
        began = time.monotonic()
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still(self._path, file):
                    return file
                owner = None  # whoever made it has removed its folder in between
            except OSError as error:
                owner = Owner.named_in(file)
                if error.errno in NO_LOCKS:
                    self._refuse_a_living_neighbour(owner)
                    return file
                if error.errno not in _TAKEN:
                    os.close(file)
                    raise
            os.close(file)
            patience = SECONDS_FOR_THE_LIVING if owner is None or owner.seems_to_live() else SECONDS_FOR_THE_DEAD
            if time.monotonic() - began > patience:
                raise self._in_use(owner)
            time.sleep(_PAUSE_SECONDS)

    def _refuse_a_living_neighbour(self, owner: Owner | None) -> None:
        """All that can be done on a file system without locks."""
        if owner is not None and owner.is_on_this_host() and owner.seems_to_live() and owner.pid != os.getpid():
            raise self._in_use(owner)
        log.warning(
            "%s: this file system has no locks; a second job on the same folder is only noticed on this machine",
            self._path.parent,
        )

    def _in_use(self, owner: Owner | None) -> CheckpointError:
        return CheckpointError(
            f"{self._path.parent} is in use by another job ({owner or 'owner unknown'}); wait for it, stop it, "
            "or choose another --run_name"
        )

    def _sign(self) -> None:
        """Write who holds it: over the one before, so that a reader never finds nobody. A full disk costs just the name."""
        text = f"{Owner.this_process()}\n".encode()
        try:
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))
        except OSError as error:
            log.warning("%s could not be written: %s", self._path, error.strerror)


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except OSError:
        return False
