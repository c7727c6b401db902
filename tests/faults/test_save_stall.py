"""A slow disk holds training up for a copy of the state, and not for what is written."""

import os
import time

from dist_trainer.checkpoint.manager import QUICK_SECONDS
from tests.faults.faults import do
from tests.pace import allowed

FSYNC_SECONDS = 0.3
MOST_STALL_MS = 1000 * QUICK_SECONDS + 200
"""A copy takes about a millisecond here; the rest is for a busy machine."""


def slow_disk():
    """Each fsync takes its time."""
    fsync = os.fsync

    def slowly(file):
        time.sleep(FSYNC_SECONDS)
        fsync(file)

    os.fsync = slowly


def test_on_a_slow_disk_training_waits_for_no_write_and_the_best_and_the_last_are_saved(run, undisturbed):
    ended = run.start(slow_disk)
    assert ended.code == 0, ended.said
    stalls = [line["checkpoint_stall_ms"] for line in run.lines() if line["checkpoint_stall_ms"] is not None]
    assert len(stalls) >= 4
    assert 1000 * run.status()["checkpoint_seconds"] > 6 * MOST_STALL_MS, "else this proves nothing"
    assert max(stalls) < allowed(MOST_STALL_MS), stalls
    assert run.newest().name == "step-00000012"
    assert run.status()["best_step"] == 12
    assert os.readlink(run.checkpoints / "best") == "step-00000012"
    run.equals(undisturbed)


def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_on_them_can_be_seen(run):
    """However slow: what is synced is noted, and nothing of the checkpoint is there until then."""
    note = run.folder.parent / "note.txt"

    def watch():
        fsync = os.fsync

        def noting(file):
            path = os.readlink(f"/proc/self/fd/{file}")
            if path.endswith("metrics.jsonl"):
                time.sleep(FSYNC_SECONDS)
                with note.open("a") as lines:
                    lines.write(f"{run.saved_steps()}\n")
            fsync(file)

        os.fsync = noting

    assert run.start(watch, do(lambda trainer: trainer.checkpoints.wait(), at_step=4)).code == 0
    seen = note.read_text().splitlines()
    assert seen[0] == "[]"
    assert seen[1] == "[3]"
