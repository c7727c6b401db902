"""Processes by pid and start time, so that a number that was given to another process is never mistaken for the first; and how
long this one has run.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOST_OPEN_FILES = 65_536
"""More than any number of ranks needs, and few enough for programs that close all descriptors one by one."""

SUSPENDED_SECONDS = 2.0
"""A clock that is read several times a second, and was not for so long, belongs to a process that was suspended."""


def allow_many_open_files() -> None:
    """Raise this process's limit of open files, often 1,024, as far as the system allows: rank 0 has three connections or
    more with each of the other ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MOST_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class RunningClock:
    """Seconds, by a clock that stops while this process is suspended: by SIGSTOP, by a scheduler, in a paused container."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = self._suspended = 0.0
        self._ticks = False

    def tick(self) -> None:
        """From the first call on, to be called several times a second."""
        self.now()
        self._ticks = True

    def now(self) -> float:
        """The time, in seconds since some moment."""
        with self._lock:
            now = time.monotonic()
            if self._ticks and now - self._last > SUSPENDED_SECONDS:
                self._suspended += now - self._last
            self._last = now
            return now - self._suspended


@dataclass(frozen=True)
class ProcessId:
    """One process of one machine."""

    host: str
    pid: int
    namespace: int
    """Of process ids: containers on one machine do not see one another's processes."""
    started: int
    """Clock ticks since the machine's start; 0 where the system does not tell."""

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The process `pid` of this machine."""
        return cls(socket.gethostname(), pid, _namespace(), _state_and_start(pid)[1])

    def is_near(self) -> bool:
        """Whether this process can be seen and signalled from here."""
        return self.host == socket.gethostname() and self.namespace == _namespace()

    def is_alive(self) -> bool:
        """Whether it runs or is stopped; one that has ended and waits to be reaped does not."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        state, started = _state_and_start(self.pid)
        return state not in ("Z", "X") and started == self.started

    def kill(self) -> None:
        """SIGKILL, if it still is the same process."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)


def command_of(pid: int) -> list[str]:
    """The words of its command; none where the system does not tell."""
    return _strings(Path(f"/proc/{pid}/cmdline"))


def environment_of(pid: int) -> dict[str, str]:
    """The environment that it was started with; empty if the system does not tell."""
    variables = (text.partition("=") for text in _strings(Path(f"/proc/{pid}/environ")))
    return {name: value for name, _, value in variables}


def siblings() -> dict[int, dict[str, str]]:
    """The other processes that this one's parent has started, and the environments they began with, as far as can be seen."""
    found: dict[int, dict[str, str]] = {}
    for children in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        with suppress(OSError):
            for pid in map(int, children.read_text().split()):
                found[pid] = environment_of(pid)
    found.pop(os.getpid(), None)
    return found


def _strings(file: Path) -> list[str]:
    try:
        return file.read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _state_and_start(pid: int) -> tuple[str, int]:
    """From /proc/PID/stat (fields 3 and 22); the name before them may hold anything but ends with the last bracket."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", 0
