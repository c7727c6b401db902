"""logs/progress: written at each step, read back whatever it holds."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from dist_trainer.tracking.run_reader import complete_lines, read_progress
from dist_trainer.tracking.status import StepCounter
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
