"""Signals that ask a run to stop: SIGTERM, SIGUSR1, SIGINT, and SIGHUP unless it was ignored at the start, as by nohup.

The handler only sets a flag, which the trainer shares over all ranks once a step: all stop at the same step. In the long
preparations before the first step, where nothing can be lost, it raises StoppedError instead, and again where a library
swallowed it (torch's probe of the C++ compiler takes any exception for its answer). A second signal changes nothing; a
third one ends the process at once, also while the main thread hangs in a collective, where Python runs no handlers: a
thread counts them too, by the descriptor that Python writes each signal's number to as it comes. Once the
outcome stands and the process is about to end, signals change nothing at all.
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
"""What asks a run to stop. SIGHUP: its terminal was closed, or the connection to it was lost."""
SECONDS_TO_RAISE_AGAIN = 0.5
"""A tick: so often StoppedError is raised anew where it was swallowed."""
TICKS_TO_CLEAN_UP = 10
"""So often what handles the error is left in peace; then it is broken off too, for it may be a library that goes on."""
PATIENCE = 3
"""The signal of this count ends the process without saving. SIGHUP does not count: nobody sends it out of impatience, and
closing a terminal may send several, from the shell, the kernel and the session manager."""
_GOODBYE = b"\0"
"""No signal has the number 0."""


def heeded_stop_signals() -> list[signal.Signals]:
    """The STOP_SIGNALS to handle: without SIGHUP if this process was started to ignore it, as by nohup."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


class StopRequest:
    """Whether this rank was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_number = 0
        self.lost_launcher = ""
        """What was lost, where that asked, and no signal."""
        self._count = 0
        self._listening = False
        self._breaks_off = False
        self._is_answered = False
        self._alarm_before: Any = None
        """Handler of SIGALRM outside `interruptible`; None: ours is not there."""
        self._timer_before = (0.0, 0.0)
        self._ticks = 0

    def __bool__(self) -> bool:
        return self.signal_number != 0 or self.lost_launcher != ""

    def note_lost_launcher(self, reason: str) -> None:
        """Ask this rank to stop because its launcher has died; called by the thread that noticed."""
        self.lost_launcher = reason

    @contextmanager
    def listen(self, *, for_good: bool = False) -> Generator[StopRequest]:
        """Take the stop signals while the context lasts (in the main thread, where Python delivers them).

        `for_good`: after it they are ignored, rather than handled as before: to be left for a process that is about to end.
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
        """The outcome stands, and the process is about to leave: further signals change nothing, however many they are."""
        self._is_answered = True

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """Raise StoppedError as soon as a signal has come, in the midst of what is done here if need be.

        For work of one rank alone: a rank that breaks off a collective would leave the others waiting.
        """
        if self:
            raise StoppedError(self.signal_number)
        self._take_alarm()
        try:
            try:
                self._breaks_off = True
                yield
            finally:
                self._breaks_off = False
        except Exception as error:
            # A library may have wrapped or replaced what the handler raised within it.
            if self and not isinstance(error, StoppedError):
                raise StoppedError(self.signal_number) from error
            raise
        finally:
            self._breaks_off = False  # once more: the alarm may have raised where it was to become so
            self._give_alarm_back()
        if self:
            raise StoppedError(self.signal_number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += number != signal.SIGHUP
        if self._count >= PATIENCE and not self._is_answered:
            os._exit(128 + number)
        first = self.signal_number == 0
        if first:  # later ones may be a launcher's way to hurry: this one is the reason
            self.signal_number = number
        if first and self._breaks_off:
            if self._alarm_before is not None:
                self._timer_before = signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_RAISE_AGAIN, SECONDS_TO_RAISE_AGAIN)
            raise StoppedError(number)

    def _take_alarm(self) -> None:
        if self._listening and threading.current_thread() is threading.main_thread():
            self._alarm_before = signal.signal(signal.SIGALRM, self._handle_alarm) or signal.SIG_DFL

    def _give_alarm_back(self) -> None:
        if self._alarm_before is not None:
            if self:
                signal.setitimer(signal.ITIMER_REAL, *self._timer_before)
            signal.signal(signal.SIGALRM, self._alarm_before)
            self._alarm_before = None

    def _handle_alarm(self, number: int, frame: FrameType | None) -> None:
        if not self:  # somebody else's
            if callable(self._alarm_before):
                self._alarm_before(number, frame)
        elif self._breaks_off:
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
            os.write(writing, _GOODBYE)  # closing it would not do: forked data workers hold it open too
            counter.join()
            os.close(writing)
            os.close(reading)

    def _count_signals(self, pipe: int) -> None:
        count = 0
        while _GOODBYE not in (numbers := os.read(pipe, 64)):
            asked = [number for number in numbers if number in STOP_SIGNALS and number != signal.SIGHUP]
            count += len(asked)
            if count >= PATIENCE and not self._is_answered:
                os._exit(128 + asked[-1])


def _is_unwinding() -> bool:
    """Whether a StoppedError, or what a library made of it, is being handled."""
    error = sys.exception()
    while error is not None and not isinstance(error, StoppedError):
        error = error.__context__
    return error is not None


def _forget_wakeup_descriptor() -> None:
    """In forked workers: Ctrl-C reaches them too, and must not count for their parent."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_wakeup_descriptor)


def signal_name(number: int) -> str:
    """`SIGTERM` for 15; a number without name as it stands."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
