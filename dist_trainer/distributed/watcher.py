"""Watches the launcher and the other ranks, and ends this process if one of them has failed."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from dist_trainer.distributed.beats import FailedRank, find_silent_ranks
from dist_trainer.distributed.peers import Peers, RunningClock
from dist_trainer.errors import EXIT_CRASHED

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.25
GRACE_SECONDS = 4.0
"""Time for a rank whose peer is gone to notice it by a closed connection and exit cleanly."""
LOG_SECONDS = 3.0
HEAD_START_SECONDS = 1.0
"""The rank that names a hung one exits this much earlier than the others; otherwise it might take their exit for the cause."""


class Watcher:
    """The thread that checks several times a second whether the launcher and this machine's ranks are alive, and which ranks
    have failed according to `peers`.
    """

    def __init__(
        self,
        rank: int,
        peers: Peers,
        clock: RunningClock,
        stopped: threading.Event,
        *,
        can_stop_in_order: Callable[[], bool],
        on_fatal: Callable[[str], None],
    ) -> None:
        """`can_stop_in_order`: whether the main thread can act on a request to stop."""
        self.ranks_may_leave = False
        """Whether ranks may exit without counting as lost."""
        self._rank, self._peers, self._clock, self._stopped = rank, peers, clock, stopped
        self._can_stop_in_order, self._on_fatal = can_stop_in_order, on_fatal
        self._launcher: int | None = None
        self._on_lost_launcher: Callable[[str], None] = lambda reason: None
        self._thread: threading.Thread | None = None

    def watch_launcher(self, parent: int, on_lost_launcher: Callable[[str], None]) -> None:
        """Also watch `parent`, the process that started this one."""
        self._launcher, self._on_lost_launcher = parent, on_lost_launcher
        self.start()

    def start(self) -> None:
        """Start to watch, unless it already does."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch_loop, name="watch", daemon=True)
            self._thread.start()

    def _watch_loop(self) -> None:
        while not self._stopped.wait(WATCH_SECONDS):
            self._clock.tick()
            if self._launcher is not None and os.getppid() != self._launcher:
                self._handle_lost_launcher(f"the launcher (pid {self._launcher}) is gone")
            if not self.ranks_may_leave:
                self._look_for_gone_ranks()
            if failed := self._failed_ranks():
                self._leave(failed)

    def _handle_lost_launcher(self, reason: str) -> None:
        if self._can_stop_in_order():
            self._on_lost_launcher(reason)
            return
        if self._rank == 0:
            self._log_fatal(reason)
        os._exit(EXIT_CRASHED)

    def _look_for_gone_ranks(self) -> None:
        for rank, process in enumerate(self._peers.processes):
            if rank != self._rank and rank not in self._peers.gone_since and process.is_local() and not process.is_alive():
                self._peers.mark_gone(rank)

    def _failed_ranks(self) -> list[FailedRank]:
        """The failed ranks that require this process to end now."""
        peers = self._peers
        if hanging := peers.hanging():
            return hanging
        if peers.gone_since and not self.ranks_may_leave:
            waited = time.monotonic() - min(peers.gone_since.values())
            return peers.gone() if waited > GRACE_SECONDS else []
        if self._rank != 0 and peers.processes:  # rank 0 judges all ranks but itself
            return find_silent_ranks([(0, peers.beats[0], peers.silent_seconds(0))])
        return []

    def _leave(self, failed: list[FailedRank]) -> None:
        processes = self._peers.processes
        lost = {rank.rank for rank in failed}
        able = [rank for rank in range(len(processes)) if rank not in lost] or sorted(lost)
        if self._rank == able[0]:
            self._log_fatal(self._peers.describe(failed))
        elif any(not rank.is_gone for rank in failed):
            time.sleep(HEAD_START_SECONDS)
        if self._rank == next((rank for rank in able if processes[rank].is_local()), None):
            for process in (processes[rank] for rank in lost - {self._rank}):
                if process.is_local():
                    process.kill()  # a process suspended by SIGSTOP would outlive all others
        os._exit(EXIT_CRASHED)

    def _log_fatal(self, reason: str) -> None:
        """Log in a separate thread: a log that blocks must not keep this process alive."""

        def act() -> None:
            log.error("%s. Aborting; rerun to resume from the last checkpoint", reason)
            self._on_fatal(reason)

        thread = threading.Thread(target=act, name="fatal log", daemon=True)
        thread.start()
        thread.join(LOG_SECONDS)
