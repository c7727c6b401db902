"""Writes snapshots one after another behind the training's back; what waits too long gives way to what is newer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from dist_trainer.checkpoint.state import Snapshot

QUICK_SECONDS = 0.25
"""So long a new save waits for the write before it. Where steps take milliseconds several saves fall due within one write
that is quick all the same, and leaving one out would lose steps for nothing."""


@dataclass(frozen=True)
class Save:
    """A snapshot that is to be written."""

    snapshot: Snapshot
    is_best: bool
    after: Callable[[], None]
    """Makes durable what the checkpoint counts on; called before any of it is visible."""


class BackgroundWriter:
    """At most one write at a time, in a thread that lives as long as something is to be written."""

    def __init__(self, write: Callable[[Save], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._waiting: list[Save] = []
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None
        self._step_in_flight: int | None = None

    def holds(self, step: int) -> bool:
        """Whether a snapshot of `step` waits, or is being written."""
        with self._lock:
            return step == self._step_in_flight or any(save.snapshot.progress.step == step for save in self._waiting)

    def add(self, take: Callable[[], Snapshot], *, is_best: bool, after: Callable[[], None]) -> None:
        """Take a snapshot now, and write it as soon as the one in flight is written.

        It takes the place of one that waits still, but for the best one, whose place only a better one takes. So the newest
        and the best are always written, and the host holds one copy of the state where a write ends before the next save,
        else two, and three where one of those that wait is the best.
        """
        self.wait(QUICK_SECONDS)
        with self._lock:  # before the next copy takes up memory
            self._waiting = [save for save in self._waiting if save.is_best and not is_best]
        save = Save(take(), is_best, after)
        with self._lock:
            self._waiting.append(save)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-writer")
                self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Until all is written, or `seconds` have passed; what `write` raised is raised here, once."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        if self._crash is not None:
            crash, self._crash = self._crash, None
            raise crash

    def _work(self) -> None:
        while (save := self._next()) is not None:
            try:
                self._write(save)
            except BaseException as error:
                self._crash = error
            del save  # its memory, before the next one is waited for

    def _next(self) -> Save | None:
        with self._lock:
            if self._crash is not None:
                self._waiting.clear()
            save = self._waiting.pop(0) if self._waiting else None
            self._step_in_flight = None if save is None else save.snapshot.progress.step
            if save is None:
                self._thread = None
            return save
