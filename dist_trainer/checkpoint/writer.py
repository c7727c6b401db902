"""Writes snapshots one after another in the background; one that waits too long is dropped in favour of a newer one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from dist_trainer.checkpoint.state import Snapshot

QUICK_SECONDS = 0.25
"""How long a new save waits for the write before it. If steps take milliseconds, several saves are due within one write that is
quick all the same, and dropping one would lose steps for nothing."""


@dataclass(frozen=True)
class Save:
    """A snapshot that is to be written."""

    snapshot: Snapshot
    is_best: bool
    before_publish: Callable[[], None]
    """Makes durable what the checkpoint relies on; called before any of it is visible."""


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
        """Whether a snapshot of `step` is waiting or being written."""
        with self._lock:
            return step == self._step_in_flight or any(save.snapshot.progress.step == step for save in self._waiting)

    def add(self, make_snapshot: Callable[[], Snapshot], *, is_best: bool, before_publish: Callable[[], None]) -> None:
        """Take a snapshot now, and write it as soon as the one in flight is written.

        It replaces one that is still waiting, but the best one is only replaced by a better one. So the newest and the best
        are always written, and the host holds one copy of the state if a write ends before the next save, else two, and three
        if one of those that wait is the best.
        """
        self.wait(QUICK_SECONDS)
        with self._lock:  # before the next copy takes up memory
            self._waiting = [save for save in self._waiting if save.is_best and not is_best]
        save = Save(make_snapshot(), is_best, before_publish)
        with self._lock:
            self._waiting.append(save)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-writer")
                self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Return when all is written, or after `seconds`; raises what a write has raised, once."""
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
