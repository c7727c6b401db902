"""logs/progress: written at each step, read back whatever it holds; and the digest of weights in status.json."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from dist_trainer.tracking import status
from dist_trainer.tracking.run_reader import complete_lines, read_progress, read_status
from dist_trainer.tracking.status import StatusTracker, StepCounter, amend_status, write_status
from tests.pace import allowed


def test_noting_a_step_takes_microseconds_and_reads_back(tmp_path):
    counter = StepCounter(tmp_path)
    began = time.perf_counter()
    for step in range(1, 2001):
        counter.record(step)
    assert (time.perf_counter() - began) / 2000 < allowed(100e-6), "one on an idle machine"
    assert read_progress(tmp_path) == 2000
    counter.record(7)
    assert read_progress(tmp_path) == 7, "a shorter number leaves nothing of a longer one"


def test_a_damaged_count_counts_nothing(tmp_path):
    (tmp_path / "logs").mkdir()
    for content in (b"", b"\xff\0", b"-3", b"1" * 400, b"12 13"):
        (tmp_path / "logs" / "progress").write_bytes(content)
        assert read_progress(tmp_path) == 0, content


def test_the_count_of_a_run_made_under_the_older_name_is_read_until_the_first_step(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "steps_done").write_bytes(b"             12\n")
    assert read_progress(tmp_path) == 12
    counter = StepCounter(tmp_path)
    assert read_progress(tmp_path) == 12
    counter.record(7)
    assert read_progress(tmp_path) == 7


def test_a_disk_that_refuses_the_end_of_a_finished_run_does_not_make_it_a_crash(tmp_path, monkeypatch):
    counter = StepCounter(tmp_path)
    close = os.close

    def close_and_refuse(file):
        close(file)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as changed:
        changed.setattr(os, "close", close_and_refuse)
        counter.close()
    assert list(complete_lines(Path("/proc/self/mem"))) == [], "it can be opened, but not read"


def test_a_digest_stays_until_the_next_one_and_does_not_take_the_step_back(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "SECONDS_BETWEEN", 0.0)
    write_status(tmp_path, "running", step=0, max_steps=9)
    tracker = StatusTracker(tmp_path, 9)
    tracker.log({"kind": "train", "step": 4})
    tracker.log({"kind": "train", "step": 5})
    tracker.log({"kind": "digest", "step": 3, "digest": "0" * 64})
    assert [read_status(tmp_path)[key] for key in ("step", "digest_step", "digest")] == [5, 3, "0" * 64]
    amend_status(tmp_path, digest=["damaged"])
    write_status(tmp_path, "running", step=6, max_steps=9)
    assert read_status(tmp_path)["digest"] is None


def test_a_digest_is_written_every_few_seconds_whatever_other_lines_are(tmp_path, monkeypatch):
    write_status(tmp_path, "running", step=0, max_steps=9)
    tracker = StatusTracker(tmp_path, 9)
    now = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for step in (1, 2):
        tracker.log({"kind": "train", "step": step})
        tracker.log({"kind": "digest", "step": step, "digest": str(step) * 64})
    assert [read_status(tmp_path)[key] for key in ("step", "digest_step")] == [1, 1]
