"""Signs of life: which rank is gone, which one hangs, whether the launcher still lives. No collective tells that in time.

Two threads of each rank see to it, since its main thread may be waiting in a collective for ever. One tells rank 0 several
times a second how far its rank is, over a TCPStore that rank 0 keeps, and reads what rank 0 makes of all of them. The other
looks whether the launcher and the ranks of this machine are alive. A run whose launcher is gone saves and leaves; where it
cannot continue without a rank, this process is ended after one line in the log that names the rank, its machine, and where it
was last seen.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import NamedTuple

import torch.distributed as dist

from dist_trainer.distributed.beats import (
    FIRST_STEP_MINUTES,
    IS_GONE,
    LATER_MINUTES,
    STEPPING,
    WAITING,
    Beat,
    Finding,
    Phase,
    decode_beat,
    encode_beat,
    judge,
    silent_ranks,
)
from dist_trainer.errors import EXIT_CRASHED
from dist_trainer.storage.processes import ProcessId

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.2
"""Between two beats of a rank, for up to RANKS_HEARD_AT_ONCE ranks; rank 0 hears them all, so more of them speak less often."""
RANKS_HEARD_AT_ONCE = 64
LOOK_SECONDS = 0.25
GRACE_SECONDS = 4.0
"""For a rank whose peer is gone: to notice by itself, by a closed connection, and leave in order."""
LOST_PEERS_SECONDS = 2.0
SPEAKING_SECONDS = 3.0
STOPPING_SECONDS = 5.0
FIRST_WORD_SECONDS = 1.0
"""So much earlier than the others leaves the rank that names a hanging one: else it might take their leaving for the cause."""
SUSPENDED_SECONDS = 2.0
"""A clock that is read several times a second, and was not for so long, belongs to a process that was suspended."""


class RunningClock:
    """Seconds, by a clock that stops while this process is suspended: by SIGSTOP, by a scheduler, in a paused container."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = self._suspended = 0.0
        self._ticks = False

    def tick(self) -> None:
        """From the first call on, to be called several times a second."""
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


class RankInfo(NamedTuple):
    """Where the main thread is."""

    phase: Phase
    step: int
    """Finished steps."""
    since: float
    """When it last made progress, by the heartbeat's clock."""


class Heartbeat:
    """This rank's sign of life, and its eye on the others. Before a call of `watch_...` it only notes the phase."""

    def __init__(
        self, *, rank: int = 0, timeout_minutes: float | None = None, on_fatal: Callable[[str], None] | None = None
    ) -> None:
        """`on_fatal`: called with a sentence, on one of the remaining ranks, before this process exits."""
        self.rank = rank
        self.timeout_minutes = timeout_minutes
        self._on_fatal = on_fatal or (lambda reason: None)
        self.told = Beat()
        """The last one of this rank that the others can know."""
        # All ranks may have been suspended at once: that is nobody's silence.
        self._clock = RunningClock()
        self._place = RankInfo("preparing", 0, self._clock.now())
        self._step_seconds = self._longest_step_seconds = 0.0
        self._steps_done = 0
        self._first_step_is_done = False
        self._exchanging: threading.Thread | None = None
        self._launcher: int | None = None
        self._note_lost_launcher: Callable[[str], None] = lambda reason: None
        self._has_begun_to_train = False
        self._members: list[ProcessId] = []
        self._beats: dict[int, Beat] = {}
        self._changed: dict[int, float] = {}
        self._gone_since: dict[int, float] = {}
        self._findings: list[Finding] = []
        self._peers_may_leave = False
        self._stopped = threading.Event()

    # -------------------------------------------------------------------------------- what the main thread says

    def mark(self, phase: Phase, *, step: int | None = None) -> None:
        """The main thread has made progress: it has come to `phase`, or further in it, after `step` finished steps (None: as
        many as before).
        """
        before, now = self._place, self._clock.now()
        step = before.step if step is None else step
        if before.phase in STEPPING:
            self._step_seconds += now - before.since
            if step > before.step:
                longest = self._longest_step_seconds if self._steps_done > 1 else 0.0
                self._longest_step_seconds, self._step_seconds = max(longest, self._step_seconds), 0.0
                self._steps_done += 1
        self._has_begun_to_train |= phase == "reading data"
        # What may take long only once, such as compilation, is over where another step begins.
        self._first_step_is_done |= phase == "training" and self._steps_done > 0
        self._place = RankInfo(phase, step, now)

    @contextmanager
    def waiting(self, phase: Phase = "waiting for others") -> Generator[None]:
        """While the context lasts the main thread waits for other ranks, which may be behind."""
        before = self._place.phase
        self.mark(phase)
        yield
        self.mark(before)

    @property
    def phase(self) -> Phase:
        """What the main thread is at, as it last said."""
        return self._place.phase

    def begin_shutdown(self) -> None:
        """All ranks are about to leave, some a little earlier: from here on only silence counts."""
        self._peers_may_leave = True

    def stop(self) -> None:
        """No more signs of life, no more looking.

        The interpreter's end would abort this process where it found the exchanging thread within the store's C++.
        """
        self._stopped.set()
        if self._exchanging is not None:
            self._exchanging.join(STOPPING_SECONDS)

    def lost_peers(self) -> str | None:
        """Which ranks are gone, if any, in a sentence; waits a moment, for what went wrong here may come from there."""
        end = time.monotonic() + LOST_PEERS_SECONDS
        while self._members and not self._stopped.is_set() and time.monotonic() < end:
            if self._hanging():
                end = time.monotonic() + 2 * SPEAKING_SECONDS  # the watching thread is about to name it and to end this process
            elif self._gone_since:
                return self._in_words(self._gone())
            time.sleep(LOOK_SECONDS)
        return None

    def is_acting_rank0(self) -> bool:
        """Whether rank 0 is known to be gone, and this is the first rank that is not."""
        return 0 in self._gone_since and all(rank in self._gone_since for rank in range(self.rank))

    # ------------------------------------------------------------------------------------------------ watching

    def watch_launcher(self, parent: int, note_lost_launcher: Callable[[str], None]) -> None:
        """Soon after `parent`, the process that started this one, has ended, tell `note_lost_launcher` so: the main thread is
        to save and leave. Where it has not begun to train, or makes no progress, end this process instead.
        """
        self._launcher, self._note_lost_launcher = parent, note_lost_launcher
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def lay_out(self, store: dist.Store, num_ranks: int) -> None:
        """Rank 0: make all entries, so that nobody waits for one that has not been told yet."""
        for rank in range(num_ranks):
            store.set(_key(rank), encode_beat(Beat(patience_seconds=self.patience_seconds())))
        store.set(FINDINGS_KEY, "[]")

    def watch_peers(self, members: list[ProcessId], store: dist.Store) -> None:
        """Look after all ranks, by way of `store`, which rank 0 keeps and all have reached."""
        now = self._clock.now()
        self._changed = {rank: now for rank in range(len(members))}
        self._beats = {rank: Beat(patience_seconds=self.patience_seconds()) for rank in range(len(members))}
        self._members = members
        if self._launcher is None:
            threading.Thread(target=self._look, name="watch", daemon=True).start()
        self._exchanging = threading.Thread(target=self._exchange, args=(store,), name="heartbeat", daemon=True)
        self._exchanging.start()

    def patience_seconds(self) -> float:
        """How long others are to bear the silence of this process now."""
        default = LATER_MINUTES if self._first_step_is_done else FIRST_STEP_MINUTES
        return 60.0 * (default if self.timeout_minutes is None else self.timeout_minutes)

    def _exchange(self, store: dist.Store) -> None:
        """Tell, and read: rank 0 what all tell, the others what rank 0 tells and has found. Ends where it cannot be reached."""
        of_interest = range(len(self._members)) if self.rank == 0 else (0,)
        pause_seconds = BEAT_SECONDS * max(1.0, len(self._members) / RANKS_HEARD_AT_ONCE)
        try:
            while not self._stopped.wait(pause_seconds):
                beat = self._own_beat()
                store.set(_key(self.rank), encode_beat(beat))
                self.told = beat
                for rank, text in zip(of_interest, store.multi_get([_key(rank) for rank in of_interest]), strict=True):
                    self._hear(rank, decode_beat(text))
                self._spread_findings(store)
        except (dist.DistError, RuntimeError) as error:
            log.debug("no more signs of life by way of rank 0: %s", error)

    def _own_beat(self) -> Beat:
        place = self._place
        return Beat(
            place.step,
            place.phase,
            self._clock.now() - place.since,
            self.patience_seconds(),
            self._longest_step_seconds,
            tuple(self._gone_since),
            self.told.number + 1,
        )

    def _hear(self, rank: int, beat: Beat) -> None:
        if beat.number != self._beats[rank].number:
            self._changed[rank] = self._clock.now()
        self._beats[rank] = beat

    def _spread_findings(self, store: dist.Store) -> None:
        if self._hanging():
            return  # is the cause: others that are gone by now have left for it
        if self.rank == 0:
            self._findings = judge(list(self._beats.values()), [self._silent_seconds(rank) for rank in self._beats])
            store.set(FINDINGS_KEY, json.dumps([asdict(finding) for finding in self._findings]))
        else:
            told = json.loads(store.get(FINDINGS_KEY))
            self._findings = [Finding(f["rank"], f["trouble"], decode_beat(f["beat"])) for f in told]
        for finding in self._findings:
            if finding.is_gone:
                self._gone_since.setdefault(finding.rank, time.monotonic())

    def _silent_seconds(self, rank: int) -> float:
        return self._clock.now() - self._changed[rank]

    def _look(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            self._clock.tick()
            if self._launcher is not None:
                self._look_after_launcher(f"the launcher (pid {self._launcher}) is gone")
            self._look_after_near_ranks()
            if findings := self._to_act_on():
                self._leave(findings)

    def _look_after_launcher(self, lost: str) -> None:
        if os.getppid() == self._launcher:
            return
        beat = self._own_beat()
        is_stuck = beat.lacks_progress and beat.phase not in WAITING
        if self._has_begun_to_train and not is_stuck:
            self._note_lost_launcher(lost)
            return
        if self.rank == 0:
            self._say(lost)
        os._exit(EXIT_CRASHED)

    def _look_after_near_ranks(self) -> None:
        if self._peers_may_leave:
            return
        for rank, member in enumerate(self._members):
            if rank != self.rank and rank not in self._gone_since and member.is_local() and not member.is_alive():
                self._gone_since[rank] = time.monotonic()

    def _hanging(self) -> list[Finding]:
        return [finding for finding in self._findings if not finding.is_gone]

    def _to_act_on(self) -> list[Finding]:
        if hanging := self._hanging():
            return hanging
        if self._gone_since and not self._peers_may_leave:
            waited = time.monotonic() - min(self._gone_since.values())
            return self._gone() if waited > GRACE_SECONDS else []
        if self.rank != 0 and self._members:  # rank 0 judges all; who judges rank 0?
            return silent_ranks([(0, self._beats[0], self._silent_seconds(0))])
        return []

    def _gone(self) -> list[Finding]:
        return [Finding(rank, IS_GONE, self._beats[rank]) for rank in sorted(self._gone_since)]

    # ------------------------------------------------------------------------------------------------- leaving

    def _leave(self, findings: list[Finding]) -> None:
        lost = {finding.rank for finding in findings}
        able = [rank for rank in range(len(self._members)) if rank not in lost] or sorted(lost)
        reason = self._in_words(findings)
        if self.rank == able[0]:
            self._say(reason)
        elif any(not finding.is_gone for finding in findings):
            time.sleep(FIRST_WORD_SECONDS)
        if self.rank == next((rank for rank in able if self._members[rank].is_local()), None):
            for member in (self._members[rank] for rank in lost - {self.rank}):
                if member.is_local():
                    member.kill()  # a stopped process would outlive all others
        os._exit(EXIT_CRASHED)

    def _in_words(self, findings: Sequence[Finding]) -> str:
        return "; ".join(
            f"rank {finding.rank} on {self._members[finding.rank].host} (pid {self._members[finding.rank].pid}) "
            f"{finding.trouble}; it was last seen in step {finding.beat.step + 1}, {finding.beat.phase}"
            for finding in findings
        )

    def _say(self, reason: str) -> None:
        """In a thread of its own: a log that blocks must not keep this process."""

        def say() -> None:
            log.error("%s. The run ends here; the same command goes on from its last checkpoint", reason)
            self._on_fatal(reason)

        speaking = threading.Thread(target=say, name="last words", daemon=True)
        speaking.start()
        speaking.join(SPEAKING_SECONDS)


FINDINGS_KEY = "findings"


def _key(rank: int) -> str:
    return f"beat/{rank}"
