"""How a heartbeat measures the progress of its rank, and how it ends."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from dist_trainer.distributed.beats import Beat, encode_beat
from dist_trainer.distributed.heartbeat import Heartbeat
from dist_trainer.storage.processes import ProcessId


class SlowStore:
    """Its answer comes when `answers` is set."""

    def __init__(self) -> None:
        self.requested, self.answers, self.has_answered = threading.Event(), threading.Event(), False

    def set(self, key: str, value: str) -> None:
        pass

    def multi_get(self, keys: list[str]) -> list[str]:
        self.requested.set()
        self.answers.wait(60)
        self.has_answered = True
        return [encode_beat(Beat()) for _ in keys]


def test_a_stopped_heartbeat_no_longer_uses_the_store() -> None:
    """There the interpreter's end would abort the process: a finished run would end with SIGABRT."""
    heartbeat, store = Heartbeat(), SlowStore()
    anything: Any = store
    heartbeat.watch_peers([ProcessId.of(os.getpid())], anything)
    assert store.requested.wait(60)
    threading.Timer(0.2, store.answers.set).start()
    heartbeat.stop()
    assert store.has_answered
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("dist_trainer.distributed.heartbeat.time.monotonic", lambda: now[0])
    return now


def steps(heartbeat: Heartbeat, clock: list[float], *, start: int, seconds: list[float]) -> None:
    """Each of two micro-batches that are read and trained on, and a wait for others that is longer than all of it."""
    for step, each in enumerate(seconds, start):
        for phase in ("reading data", "reading data", "training", "backward"):
            heartbeat.mark(phase, step=step)  # type: ignore[arg-type]
            clock[0] += each / 4
            with heartbeat.waiting():
                clock[0] += 50 * each
        heartbeat.mark("reading data", step=step + 1)


def test_the_longest_step_counts_what_a_rank_does_itself_from_its_first_step_on(clock: list[float]) -> None:
    heartbeat = Heartbeat()
    clock[0] += 1000.0
    heartbeat.mark("warming up", step=40)  # of a run that was resumed
    clock[0] += 1000.0
    steps(heartbeat, clock, start=40, seconds=[3.0, 8.0, 2.0])
    heartbeat.mark("saving", step=43)
    clock[0] += 1000.0
    steps(heartbeat, clock, start=43, seconds=[1.0])
    assert heartbeat.beat().longest_step_seconds == 8.0


def test_the_first_step_counts_only_until_there_is_another(clock: list[float]) -> None:
    heartbeat = Heartbeat()
    for seconds, longest in ((60.0, 60.0), (2.0, 2.0), (1.0, 2.0)):
        steps(heartbeat, clock, start=heartbeat.beat().step, seconds=[seconds])
        assert heartbeat.beat().longest_step_seconds == longest


def test_each_note_is_progress_also_in_the_same_phase(clock: list[float]) -> None:
    heartbeat = Heartbeat()
    for _ in range(3):
        heartbeat.mark("validating", step=5)
        assert heartbeat.beat().idle_seconds == 0.0
        clock[0] += 7.0
        assert heartbeat.beat() == Beat(5, "validating", 7.0)


def test_time_in_which_the_entire_job_was_suspended_counts_against_no_rank(clock: list[float]) -> None:
    heartbeat = Heartbeat()
    steps(heartbeat, clock, start=0, seconds=[3.0, 3.0])
    heartbeat.mark("training", step=2)
    heartbeat.peers.join([ProcessId.of(os.getpid())], patience_seconds=60.0)
    for seconds in (0.5, 9000.0, 0.5):
        heartbeat._clock.tick()
        clock[0] += seconds
    assert heartbeat.peers.silent_seconds(0) == 1.0
    assert heartbeat.beat().idle_seconds == 1.0
    heartbeat.mark("reading data", step=3)
    assert heartbeat.beat().longest_step_seconds == 3.0


def test_the_first_step_s_patience_lasts_until_the_next_one_starts(clock: list[float]) -> None:
    heartbeat = Heartbeat()
    steps(heartbeat, clock, start=0, seconds=[1.0])
    assert heartbeat.patience_seconds() == 600.0
    heartbeat.mark("training")
    assert heartbeat.patience_seconds() == 120.0
    assert Heartbeat(timeout_minutes=0.5).patience_seconds() == 30.0
