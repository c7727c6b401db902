"""Processes forked from pytest, which has imported everything: one costs half a second, and not five."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.pace import allowed

SECONDS_OF_A_RUN = 60.0


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it printed."""

    code: int
    """Its exit code; -9 where it was killed."""
    said: str

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Process:
    """A forked process that does `act` and leaves with the exit code that it gives."""

    def __init__(self, act: Callable[[], int]) -> None:
        self._said = os.memfd_create("said")  # in memory: the disk may be full
        self._status: int | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: none of them holds a lock
            self.pid = os.fork()
        if self.pid == 0:
            _live(act, self._said)
        self._ended = os.pidfd_open(self.pid)  # readable once it has ended

    def is_running(self) -> bool:
        return not self._has_ended_within(0.0)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.is_running():
            os.kill(self.pid, number)

    def wait(self, seconds: float = SECONDS_OF_A_RUN) -> Ended:
        if not (self._has_ended_within(seconds) or self._has_ended_within(allowed(seconds) - seconds)):
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.said()}")
        assert self._status is not None
        return Ended(os.waitstatus_to_exitcode(self._status), self.said())

    def said(self) -> str:
        return os.pread(self._said, os.fstat(self._said).st_size, 0).decode(errors="replace")

    def __del__(self) -> None:
        os.close(self._said)

    def _has_ended_within(self, seconds: float) -> bool:
        if self._status is None and select.select([self._ended], [], [], seconds)[0]:
            _, self._status = os.waitpid(self.pid, 0)
            os.close(self._ended)
        return self._status is not None


def _live(act: Callable[[], int], out: int) -> None:
    code = 1
    try:
        _die_with_pytest()
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(out, "w", buffering=1)  # noqa: SIM115
        torch.set_num_threads(1)
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _die_with_pytest() -> None:
    """Or a run that waits for its test would wait for ever, once that is killed."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def wait_until(
    happened: Callable[[], bool], *, of: Process | subprocess.Popen[Any] | None = None, seconds: float = SECONDS_OF_A_RUN
) -> None:
    """Until `happened()`; an error if the process `of` ends before, or `seconds` of an idle machine have passed."""
    began = time.monotonic()
    while not happened():
        assert of is None or _is_running(of) or happened(), "it ended before"
        waited = time.monotonic() - began
        assert waited < seconds or waited < allowed(seconds) or happened(), f"it has not happened within {waited:.0f} s"
        time.sleep(0.001 if waited < 1.0 else 0.005)  # to look costs the processor time that a start needs


def kill_group(process: Process | subprocess.Popen[Any]) -> None:
    """SIGKILL to `process`, and to the group that it leads, if it does by now."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _is_running(process: Process | subprocess.Popen[Any]) -> bool:
    return process.is_running() if isinstance(process, Process) else process.poll() is None


def is_alive(pid: int) -> bool:
    """Whether a process, of anyone, runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started; none where it has ended and was waited for."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            found += [int(child) for child in children.read_text().split()]
    return found


@contextmanager
def busy_machine(processes: int = 2) -> Generator[None]:
    """Others want the processors too."""
    loops = [Process(_turn) for _ in range(processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _turn() -> int:
    while True:
        pass
