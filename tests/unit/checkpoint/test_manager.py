"""Which snapshots are written in the background, in which order, and which are dropped."""

import errno
import threading
import time

import pytest

from dist_trainer.checkpoint import manager
from dist_trainer.checkpoint.manager import BackgroundWriter, CheckpointManager
from dist_trainer.checkpoint.state import Progress, Snapshot
from dist_trainer.config.schema import CheckpointConfig


class SlowDisk:
    """Each write lasts until `is_quick` is set; records what was written, and whether two writes ever overlapped."""

    def __init__(self):
        self.steps, self.in_flight, self.most_in_flight = [], 0, 0
        self.is_quick = threading.Event()

    def write(self, save):
        save.before_publish()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.is_quick.wait(60)
        self.in_flight -= 1
        self.steps.append(save.snapshot.progress.step)


@pytest.fixture
def disk(monkeypatch):
    monkeypatch.setattr(manager, "QUICK_SECONDS", 0.01)
    return SlowDisk()


def add(background, step, *, is_best=False, before_publish=lambda: None):
    background.add(lambda: Snapshot({}, {}, {}, {}, Progress(step)), is_best=is_best, before_publish=before_publish)


@pytest.mark.parametrize(
    ("saves", "written"),
    [
        ("1", [1]),
        ("1 2", [1, 2]),
        ("1 2 3 4", [1, 4]),
        ("1 2b 3 4", [1, 2, 4]),
        ("1 2b 3b 4", [1, 3, 4]),
        ("1 2 3b 4 5b", [1, 5]),
        ("1b 2 3", [1, 3]),
    ],
)
def test_the_newest_and_the_best_are_written_one_at_a_time_and_what_else_waits_gives_way(disk, saves, written):
    background = BackgroundWriter(disk.write)
    for save in saves.split():
        add(background, int(save[0]), is_best=save.endswith("b"))
        while not disk.in_flight:  # the first one is being written before the second comes
            time.sleep(0.001)
    disk.is_quick.set()
    background.wait()
    assert disk.steps == written
    assert disk.most_in_flight == 1


def test_a_save_that_is_due_while_a_quick_write_ends_takes_nobodys_place():
    disk = SlowDisk()
    disk.is_quick.set()
    background = BackgroundWriter(disk.write)
    for step in range(1, 30):
        add(background, step)
    background.wait()
    assert disk.steps == list(range(1, 30))


def test_what_a_write_raises_is_raised_at_the_next_save_and_ends_what_waits(disk):
    def fail():
        raise ZeroDivisionError

    disk.is_quick.set()
    background = BackgroundWriter(disk.write)
    add(background, 1, before_publish=fail)
    with pytest.raises(ZeroDivisionError):
        add(background, 2)
    add(background, 3)
    background.wait()
    assert disk.steps == [3]


def full_disk(folder, write, *, metadata):
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))


def test_after_max_failures_in_a_row_and_not_before_the_disk_is_given_up(tmp_path, monkeypatch):
    checkpoints = CheckpointManager(tmp_path, CheckpointConfig(max_failures=3), save_model_fn=lambda weights, folder: None)

    def has_given_up_after_save(step):
        checkpoints.save(lambda: Snapshot({}, {}, {}, {}, Progress(step)), is_best=False, before_publish=lambda: None)
        checkpoints.wait()
        return checkpoints.has_given_up

    with monkeypatch.context() as changed:
        changed.setattr(manager, "publish", full_disk)
        assert [has_given_up_after_save(step) for step in (1, 2)] == [False, False]
    assert not has_given_up_after_save(3), "a save that succeeds starts the count anew"
    assert checkpoints.last_error is None
    monkeypatch.setattr(manager, "publish", full_disk)
    assert [has_given_up_after_save(step) for step in (4, 5, 6)] == [False, False, True]
    assert checkpoints.last_error == "step 6: the checkpoint could not be saved (ENOSPC: No space left on device)"
