"""The heartbeat: detects in time that a rank or the launcher is dead, or that a rank hangs. Collectives do not.

The main thread marks its progress here, and may wait in a collective forever. So each rank has two more threads: one (peers.py)
sends the rank's progress to rank 0 several times a second and reads which ranks have failed according to rank 0 (beats.py); the
other (watcher.py) checks whether the launcher and this machine's ranks are alive. If the launcher is gone, the run saves and
exits. If a rank has failed, this process ends, after one line in the log that names the rank, its machine, and where it was
last seen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist

from dist_trainer.distributed.beats import FIRST_STEP_MINUTES, LATER_MINUTES, STEPPING, WAITING, Beat, Phase
from dist_trainer.distributed.peers import Peers, RunningClock
from dist_trainer.distributed.watcher import LOG_SECONDS, WATCH_SECONDS, Watcher
from dist_trainer.storage.processes import ProcessId

LOST_PEERS_SECONDS = 2.0


class Mark(NamedTuple):
    """How far the main thread has got."""

    phase: Phase
    step: int
    """Finished steps."""
    time: float
    """When it was set, by the heartbeat's clock."""


class Heartbeat:
    """Records the progress of this rank's main thread and watches the other ranks. Until `watch_launcher` or `watch_peers` is
    called, it only records progress.
    """

    def __init__(
        self, *, rank: int = 0, timeout_minutes: float | None = None, on_fatal: Callable[[str], None] | None = None
    ) -> None:
        """`on_fatal`: called with a sentence, on one of the remaining ranks, before this process exits."""
        self.rank = rank
        self.timeout_minutes = timeout_minutes
        self._clock = RunningClock()  # if all ranks are suspended at once, none counts as silent
        self._mark = Mark("preparing", 0, self._clock.now())
        self._step_seconds = self._longest_step_seconds = 0.0
        self._steps_done = 0
        self._first_step_is_done = self._has_begun_to_train = False
        self._stopped = threading.Event()
        self.peers = Peers(rank, self.beat, self._clock, self._stopped)
        self._watcher = Watcher(
            rank,
            self.peers,
            self._clock,
            self._stopped,
            can_stop_in_order=self._can_stop_in_order,
            on_fatal=on_fatal or (lambda reason: None),
        )

    # ----------------------------------------------------------------------------- progress of the main thread

    def mark(self, phase: Phase, *, step: int | None = None) -> None:
        """The main thread has made progress: it has entered `phase`, or got further in it. `step`: finished steps (None:
        unchanged).
        """
        before, now = self._mark, self._clock.now()
        step = before.step if step is None else step
        if before.phase in STEPPING:
            self._step_seconds += now - before.time
            if step > before.step:
                longest = self._longest_step_seconds if self._steps_done > 1 else 0.0
                self._longest_step_seconds, self._step_seconds = max(longest, self._step_seconds), 0.0
                self._steps_done += 1
        self._has_begun_to_train |= phase == "reading data"
        # Slow first-time work such as compilation is over when another step starts.
        self._first_step_is_done |= phase == "training" and self._steps_done > 0
        self._mark = Mark(phase, step, now)

    @contextmanager
    def waiting(self, phase: Phase = "waiting for others") -> Generator[None]:
        """Inside this context the main thread is waiting for other ranks, which may be slower."""
        before = self._mark.phase
        self.mark(phase)
        yield
        self.mark(before)

    @property
    def phase(self) -> Phase:
        """The phase that the main thread marked last."""
        return self._mark.phase

    def beat(self) -> Beat:
        """What this rank reports now."""
        mark = self._mark
        idle_seconds = self._clock.now() - mark.time
        return Beat(mark.step, mark.phase, idle_seconds, self.patience_seconds(), self._longest_step_seconds)

    def patience_seconds(self) -> float:
        """How long this process may be silent now."""
        default = LATER_MINUTES if self._first_step_is_done else FIRST_STEP_MINUTES
        return 60.0 * (default if self.timeout_minutes is None else self.timeout_minutes)

    def _can_stop_in_order(self) -> bool:
        beat = self.beat()
        is_stuck = beat.lacks_progress and beat.phase not in WAITING
        return self._has_begun_to_train and not is_stuck

    # -------------------------------------------------------------------------------------- watching the others

    def watch_launcher(self, parent: int, on_lost_launcher: Callable[[str], None]) -> None:
        """Call `on_lost_launcher`, with a sentence, soon after `parent` (the process that started this one) has ended, so that
        the main thread saves and exits. If it has not started to train, or makes no progress, end this process instead.
        """
        self._watcher.watch_launcher(parent, on_lost_launcher)

    def watch_peers(self, processes: Sequence[ProcessId], store: dist.Store) -> None:
        """Watch all ranks through `store`, which rank 0 hosts and all ranks are connected to."""
        self.peers.join(processes, patience_seconds=self.patience_seconds())
        self._watcher.start()
        self.peers.exchange(store)

    def lost_peers(self) -> str | None:
        """Which ranks are gone, if any, as a sentence. Waits a moment first: this rank may notice before the watcher does."""
        end = time.monotonic() + LOST_PEERS_SECONDS
        while self.peers.processes and not self._stopped.is_set() and time.monotonic() < end:
            if self.peers.hanging():
                end = time.monotonic() + 2 * LOG_SECONDS  # the watcher is about to name it and end this process
            elif self.peers.gone_since:
                return self.peers.describe(self.peers.gone())
            time.sleep(WATCH_SECONDS)
        return None

    def is_acting_rank0(self) -> bool:
        """Whether rank 0 is known to be gone, and this is the first rank that is not."""
        gone = self.peers.gone_since
        return 0 in gone and all(rank in gone for rank in range(self.rank))

    # ------------------------------------------------------------------------------------------------- leaving

    def begin_shutdown(self) -> None:
        """All ranks are about to exit, some a little earlier: from now on only silence counts."""
        self._watcher.ranks_may_leave = True

    def stop(self) -> None:
        """Stop sending beats and watching."""
        self._stopped.set()
        self.peers.join_thread()
