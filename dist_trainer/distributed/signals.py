"""Signals that ask a run to stop: SIGTERM, SIGUSR1, SIGINT, and SIGHUP unless it was ignored at the start, as by nohup.

The handler only sets a flag, which the trainer shares with all ranks once per step: all stop at the same step. During the long
preparations before the first step, when nothing can be lost, it raises StoppedError instead, and raises it again if a library
swallowed it (torch's probe of the C++ compiler treats any exception as its answer). A second signal changes nothing. A third
ends the process at once, even if the main thread hangs in a collective, where Python runs no handlers: a thread also counts
signals, by reading the descriptor to which Python writes each signal's number. Once the outcome is decided and the process is
about to exit, signals change nothing at all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from dist_trainer.errors import StoppedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a run to stop. SIGHUP: its terminal was closed, or the connection to it was lost."""
SECONDS_TO_RAISE_AGAIN = 0.5
"""A tick: the time after which StoppedError is raised again if it was swallowed."""
TICKS_TO_CLEAN_UP = 10
"""An error handler gets this many ticks to finish; then it is interrupted too: it may be a library's that carries on."""
PATIENCE = 3
"""The third signal ends the process without saving. SIGHUP does not count: closing a terminal may send several, from the shell,
the kernel and the session manager."""
_END = b"\0"
"""Ends the thread that counts: no signal has the number 0."""


def heeded_stop_signals() -> list[signal.Signals]:
    """The STOP_SIGNALS to handle: without SIGHUP if this process was started to ignore it, as by nohup."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


class StopRequest:
    """Whether this rank was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_number = 0
        self.lost_launcher = ""
        """A sentence, if the reason to stop is the loss of the launcher, not a signal."""
        self._count = 0
        self._listening = False
        self._is_interruptible = False
        self._is_answered = False
        self._alarm_before: Any = None
        """Handler of SIGALRM to restore after `interruptible`; None: ours is not installed."""
        self._timer_before = (0.0, 0.0)
        self._ticks = 0

    def __bool__(self) -> bool:
        return self.signal_number != 0 or self.lost_launcher != ""

    def note_lost_launcher(self, reason: str) -> None:
        """Ask this rank to stop because its launcher has died. Called by the thread that noticed."""
        self.lost_launcher = reason

    @contextmanager
    def listen(self, *, for_good: bool = False) -> Generator[StopRequest]:
        """Handle the stop signals inside this context (in the main thread, where Python delivers them).

        `for_good`: afterwards they are ignored instead of handled as before, for a process that is about to exit.
        """
        if self._listening or threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._listening = True
        before = {number: signal.signal(number, self._handle) for number in heeded_stop_signals()}
        try:
            with self._third_signal_ends_at_once():
                yield self
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if for_good else handler)

    def mark_answered(self) -> None:
        """The outcome is decided and the process is about to exit: from now on any number of signals changes nothing."""
        self._is_answered = True

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """Raise StoppedError as soon as a signal arrives, in the middle of the code inside.

        Do not use it around collectives: a rank that interrupts one leaves the others waiting.
        """
        if self:
            raise StoppedError(self.signal_number)
        self._install_alarm()
        try:
            try:
                self._is_interruptible = True
                yield
            finally:
                self._is_interruptible = False
        except Exception as error:
            # A library may have wrapped or replaced the exception that the handler raised in it.
            if self and not isinstance(error, StoppedError):
                raise StoppedError(self.signal_number) from error
            raise
        finally:
            self._is_interruptible = False  # again: the alarm may have raised in the line above
            self._restore_alarm()
        if self:
            raise StoppedError(self.signal_number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += number != signal.SIGHUP
        if self._count >= PATIENCE and not self._is_answered:
            os._exit(128 + number)
        first = self.signal_number == 0
        if first:  # the first signal is the reason; later ones may come from an impatient launcher
            self.signal_number = number
        if first and self._is_interruptible:
            if self._alarm_before is not None:
                self._timer_before = signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_RAISE_AGAIN, SECONDS_TO_RAISE_AGAIN)
            raise StoppedError(number)

    def _install_alarm(self) -> None:
        if self._listening and threading.current_thread() is threading.main_thread():
            self._alarm_before = signal.signal(signal.SIGALRM, self._handle_alarm) or signal.SIG_DFL

    def _restore_alarm(self) -> None:
        if self._alarm_before is not None:
            if self:
                signal.setitimer(signal.ITIMER_REAL, *self._timer_before)
            signal.signal(signal.SIGALRM, self._alarm_before)
            self._alarm_before = None

    def _handle_alarm(self, number: int, frame: FrameType | None) -> None:
        if not self:  # the alarm is not ours
            if callable(self._alarm_before):
                self._alarm_before(number, frame)
        elif self._is_interruptible:
            self._ticks += 1
            if self._ticks > TICKS_TO_CLEAN_UP or not _is_unwinding():
                raise StoppedError(self.signal_number)

    @contextmanager
    def _third_signal_ends_at_once(self) -> Generator[None]:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        counter = threading.Thread(target=self._count_signals, args=(reading,), name="signal counter", daemon=True)
        counter.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.write(writing, _END)  # closing it is not enough: forked data workers also hold it open
            counter.join()
            os.close(writing)
            os.close(reading)

    def _count_signals(self, pipe: int) -> None:
        count = 0
        while _END not in (numbers := os.read(pipe, 64)):
            received = [number for number in numbers if number in STOP_SIGNALS and number != signal.SIGHUP]
            count += len(received)
            if count >= PATIENCE and not self._is_answered:
                os._exit(128 + received[-1])


def _is_unwinding() -> bool:
    """Whether a StoppedError, or an error that replaced it, is being handled."""
    error = sys.exception()
    while error is not None and not isinstance(error, StoppedError):
        error = error.__context__
    return error is not None


def _forget_wakeup_descriptor() -> None:
    """In forked workers: Ctrl-C reaches them too, and must not be counted by their parent."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_wakeup_descriptor)
