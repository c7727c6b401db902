"""What a rank knows about all ranks (their processes, last beats, and which have failed), and the thread that exchanges it
through a TCPStore that rank 0 hosts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.distributed as dist

from dist_trainer.distributed.beats import (
    IS_GONE,
    Beat,
    FailedRank,
    decode_beat,
    decode_failed_ranks,
    encode_beat,
    encode_failed_ranks,
    find_failed_ranks,
)
from dist_trainer.storage.processes import ProcessId

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.2
"""Between two beats of a rank, for up to RANKS_READ_AT_ONCE ranks. Rank 0 reads all beats, so if there are more ranks, they
send less often."""
RANKS_READ_AT_ONCE = 64
STOPPING_SECONDS = 5.0
FAILED_RANKS_KEY = "failed ranks"
SUSPENDED_SECONDS = 2.0
"""If a clock that is normally read several times a second was not read for this long, its process was suspended."""


class RunningClock:
    """A clock in seconds that stops while this process is suspended: by SIGSTOP, a scheduler, or a paused container."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = self._suspended = 0.0
        self._ticks = False

    def tick(self) -> None:
        """Must be called several times a second from the first call on."""
        self.now()
        self._ticks = True

    def now(self) -> float:
        """The time in seconds, since an arbitrary moment."""
        with self._lock:
            now = time.monotonic()
            if self._ticks and now - self._last > SUSPENDED_SECONDS:
                self._suspended += now - self._last
            self._last = now
            return now - self._suspended


class Peers:
    """All ranks, including this one. Empty until `join`.

    The thread of `exchange` writes `beats` and `failed`; it and the watcher's thread write `gone_since`; any thread may read.
    """

    def __init__(self, rank: int, own_beat: Callable[[], Beat], clock: RunningClock, stopped: threading.Event) -> None:
        self.processes: list[ProcessId] = []
        """The process of each rank."""
        self.beats: dict[int, Beat] = {}
        """The last beat received from each rank; on ranks other than 0, only rank 0's."""
        self.failed: list[FailedRank] = []
        """The failed ranks, according to rank 0."""
        self.gone_since: dict[int, float] = {}
        """By rank: when this rank learned that the rank's process has ended, in time.monotonic()."""
        self.last_sent = Beat()
        """This rank's last beat that the others may have received."""
        self._rank, self._own_beat, self._clock, self._stopped = rank, own_beat, clock, stopped
        self._received: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def join(self, processes: Sequence[ProcessId], *, patience_seconds: float) -> None:
        """Start with these ranks; nothing is known about them yet."""
        self.beats = {rank: Beat(patience_seconds=patience_seconds) for rank in range(len(processes))}
        self._received = {rank: self._clock.now() for rank in range(len(processes))}
        self.processes = list(processes)

    def silent_seconds(self, rank: int) -> float:
        """Time since the last new beat of `rank`."""
        return self._clock.now() - self._received[rank]

    def mark_gone(self, rank: int) -> None:
        """Record that the process of `rank` has ended."""
        self.gone_since.setdefault(rank, time.monotonic())

    def hanging(self) -> list[FailedRank]:
        """Failed ranks whose processes still exist."""
        return [rank for rank in self.failed if not rank.is_gone]

    def gone(self) -> list[FailedRank]:
        """Failed ranks whose processes have ended."""
        return [FailedRank(rank, IS_GONE, self.beats[rank]) for rank in sorted(self.gone_since)]

    def describe(self, failed: Sequence[FailedRank]) -> str:
        """Names these ranks, what happened to them, and where they were last seen."""
        return "; ".join(
            f"rank {one.rank} on {self.processes[one.rank].host} (pid {self.processes[one.rank].pid}) {one.reason} "
            f"(last seen in step {one.beat.step + 1}, {one.beat.phase})"
            for one in failed
        )

    def exchange(self, store: dist.Store) -> None:
        """Start a thread that sends this rank's beats and reads those of others: rank 0 all, other ranks only rank 0's, and
        which ranks have failed according to it. The thread ends if the store is unreachable.
        """
        self._thread = threading.Thread(target=self._exchange, args=(store,), name="heartbeat", daemon=True)
        self._thread.start()

    def join_thread(self) -> None:
        """Wait for the thread: if it is inside the store's C++ code when the interpreter exits, the process aborts."""
        if self._thread is not None:
            self._thread.join(STOPPING_SECONDS)

    def _exchange(self, store: dist.Store) -> None:
        num_ranks = len(self.processes)
        senders = range(num_ranks) if self._rank == 0 else (0,)
        pause_seconds = BEAT_SECONDS * max(1.0, num_ranks / RANKS_READ_AT_ONCE)
        try:
            while not self._stopped.wait(pause_seconds):
                self._send(store)
                for rank, text in zip(senders, store.multi_get([beat_key(rank) for rank in senders]), strict=True):
                    beat = decode_beat(text)
                    if beat.number != self.beats[rank].number:
                        self._received[rank] = self._clock.now()
                    self.beats[rank] = beat
                self._share_failed_ranks(store)
        except (dist.DistError, RuntimeError) as error:
            log.debug("the heartbeat's store on rank 0 is unreachable: %s", error)

    def _send(self, store: dist.Store) -> None:
        beat = replace(self._own_beat(), gone=tuple(self.gone_since), number=self.last_sent.number + 1)
        store.set(beat_key(self._rank), encode_beat(beat))
        self.last_sent = beat

    def _share_failed_ranks(self, store: dist.Store) -> None:
        if self.hanging():
            return  # these are the cause: ranks that have left since then did so because of them
        if self._rank == 0:
            self.failed = find_failed_ranks(list(self.beats.values()), [self.silent_seconds(rank) for rank in self.beats])
            store.set(FAILED_RANKS_KEY, encode_failed_ranks(self.failed))
        else:
            self.failed = decode_failed_ranks(store.get(FAILED_RANKS_KEY))
        for failed in self.failed:
            if failed.is_gone:
                self.mark_gone(failed.rank)


def beat_key(rank: int) -> str:
    """The store's key for the beats of `rank`."""
    return f"beat/{rank}"


def fill_store(store: dist.Store, num_ranks: int, *, patience_seconds: float) -> None:
    """On rank 0: create all keys, so that no rank waits for one that has not been sent yet."""
    for rank in range(num_ranks):
        store.set(beat_key(rank), encode_beat(Beat(patience_seconds=patience_seconds)))
    store.set(FAILED_RANKS_KEY, encode_failed_ranks([]))
