"""What a rank knows of all ranks: their processes, their last beats, and which of them have failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from dist_trainer.distributed.beats import IS_GONE, Beat, FailedRank
from dist_trainer.storage.processes import ProcessId

SUSPENDED_SECONDS = 2.0
"""If a clock that is read several times a second was not read for this long, its process was suspended."""


class RunningClock:
    """Seconds, by a clock that stops while this process is suspended: by SIGSTOP, by a scheduler, in a paused container."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = self._suspended = 0.0
        self._ticks = False

    def tick(self) -> None:
        """To be called several times a second from the first call on."""
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


class Peers:
    """All ranks, this one included. Empty until `join`.

    The messenger's thread writes `beats` and `failed`, it and the watcher's thread write `gone_since`; any thread reads.
    """

    def __init__(self, clock: RunningClock) -> None:
        self.processes: list[ProcessId] = []
        """By rank."""
        self.beats: dict[int, Beat] = {}
        """The last one received, by rank; on other ranks than 0 only rank 0's."""
        self.failed: list[FailedRank] = []
        """As rank 0 judges."""
        self.gone_since: dict[int, float] = {}
        """When this rank learned that the process of another one has ended, by rank, in time.monotonic()."""
        self._clock = clock
        self._received: dict[int, float] = {}

    def join(self, processes: Sequence[ProcessId], *, patience_seconds: float) -> None:
        """Start with these ranks, of which nothing is known yet."""
        self.beats = {rank: Beat(patience_seconds=patience_seconds) for rank in range(len(processes))}
        self._received = {rank: self._clock.now() for rank in range(len(processes))}
        self.processes = list(processes)

    def receive(self, rank: int, beat: Beat) -> None:
        """Note a beat that was read; it may be the last one again."""
        if beat.number != self.beats[rank].number:
            self._received[rank] = self._clock.now()
        self.beats[rank] = beat

    def silent_seconds(self, rank: int) -> float:
        """Time since the last new beat of `rank`."""
        return self._clock.now() - self._received[rank]

    def mark_gone(self, rank: int) -> None:
        """The process of `rank` has ended."""
        self.gone_since.setdefault(rank, time.monotonic())

    def hanging(self) -> list[FailedRank]:
        """Failed ranks whose processes still exist."""
        return [rank for rank in self.failed if not rank.is_gone]

    def gone(self) -> list[FailedRank]:
        """Failed ranks whose processes have ended."""
        return [FailedRank(rank, IS_GONE, self.beats[rank]) for rank in sorted(self.gone_since)]

    def describe(self, failed: Sequence[FailedRank]) -> str:
        """Which ranks these are, what happened to them, and where they were last seen."""
        return "; ".join(
            f"rank {one.rank} on {self.processes[one.rank].host} (pid {self.processes[one.rank].pid}) {one.reason} "
            f"(last seen in step {one.beat.step + 1}, {one.beat.phase})"
            for one in failed
        )
