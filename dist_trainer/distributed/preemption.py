"""Signals that ask a run to stop: SIGTERM, SIGUSR1, SIGINT.

The handler only sets a flag, which the trainer shares over all ranks once a step: all stop at the same step. A second
signal changes nothing; a third one ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENCE = 3
"""The signal of this count ends the process without saving."""


class StopRequest:
    """Whether this rank was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._count = 0

    def __bool__(self) -> bool:
        return self.signal_number != 0

    @contextmanager
    def listen(self) -> Iterator[StopRequest]:
        """Take the stop signals while the context lasts (in the main thread, where Python delivers them)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count >= PATIENCE:
            os._exit(128 + number)
        self.signal_number = number


def signal_name(number: int) -> str:
    """`SIGTERM` for 15; a number without name as it stands."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
