"""Processes of this machine, by pid, or by pid and start time, so that a reused pid is not mistaken for the original."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether this machine has a process `pid`, running or suspended; zombies do not count."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return _state_and_start(pid)[0] not in ("Z", "X")


@dataclass(frozen=True)
class ProcessId:
    """One process of one machine."""

    host: str
    pid: int
    namespace: int
    """Namespace of process ids: containers on one machine do not see each other's processes."""
    started: int
    """Clock ticks since the machine's start; 0 if the system does not say."""

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The process `pid` of this machine."""
        return cls(socket.gethostname(), pid, _namespace(), _state_and_start(pid)[1])

    def is_local(self) -> bool:
        """Whether this process can be seen and signalled from here."""
        return self.host == socket.gethostname() and self.namespace == _namespace()

    def is_alive(self) -> bool:
        """Whether this very process is running or stopped."""
        return is_running(self.pid) and _state_and_start(self.pid)[1] == self.started

    def kill(self) -> None:
        """Send SIGKILL, if it is still the same process."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)


def command_of(pid: int) -> list[str]:
    """The arguments of its command line; empty if the system does not say."""
    return _strings(Path(f"/proc/{pid}/cmdline"))


def environment_of(pid: int) -> dict[str, str]:
    """The environment that it was started with; empty if the system does not say."""
    variables = (text.partition("=") for text in _strings(Path(f"/proc/{pid}/environ")))
    return {name: value for name, _, value in variables}


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
