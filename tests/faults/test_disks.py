"""A disk that is really full: training continues, what was saved is untouched, and the status is true."""

import os

import pytest

from tests.faults.conftest import a_run
from tests.faults.damage import contents, fill, make_room
from tests.faults.faults import do, fill_disk, free_disk
from tests.faults.saving import Saver

FULL = "could not be saved (ENOSPC: No space left on device)"


@pytest.fixture
def run(text, small_disk):
    """A run on a small disk, which has room for it."""
    return a_run(text, small_disk / "runs")


def older_checkpoints_are_untouched(run, *, from_step, to_step):
    """The run dies of an AssertionError in `to_step` where they are not what they were in `from_step`."""
    seen = {}

    def look(trainer):
        trainer.checkpoints.wait()
        seen[trainer.progress.step] = contents(run.checkpoints)
        assert seen[from_step] == seen[trainer.progress.step]

    def lay():
        do(look, at_step=from_step)()
        do(look, at_step=to_step)()

    return lay


def test_a_full_disk_costs_a_warning_and_the_next_save_tries_again(run, undisturbed, small_disk):
    untouched = older_checkpoints_are_untouched(run, from_step=5, to_step=8)
    ended = run.start(untouched, fill_disk(small_disk, at_step=5), free_disk(small_disk, at_step=8))
    assert ended.code == 0, ended.said
    assert f"step 6: the checkpoint {FULL}, failure 2 in a row; training continues" in ended.said
    assert "step 9" not in ended.said.replace("step 9/", "")
    run.equals(undisturbed)


def test_after_max_consecutive_failures_it_stops_with_the_reason_and_resumes_once_there_is_room(run, undisturbed, small_disk):
    config = run.but(checkpoint__max_failures=2)
    ended = run.start(fill_disk(small_disk, at_step=4), config=config)
    assert ended.code == 1
    assert "failure 2 in a row" in ended.said
    status = run.status()
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "2 checkpoints in a row could not be saved (checkpoint.max_failures)" in status["reason"]
    assert run.saved_steps() == [3]
    make_room(small_disk)
    run.finish()
    assert run.resumed_at()[-1] == 3
    run.equals(undisturbed)


def test_a_failure_before_a_successful_save_counts_no_more(run, undisturbed, small_disk):
    faults = [fill_disk(small_disk, at_step=2), free_disk(small_disk, at_step=4)]
    faults += [fill_disk(small_disk, at_step=8), free_disk(small_disk, at_step=10)]
    ended = run.start(*faults, config=run.but(checkpoint__max_failures=2))
    assert ended.code == 0, ended.said
    assert ended.said.count("failure 1 in a row") == 2
    run.equals(undisturbed)


def test_a_disk_that_is_full_at_the_last_save_is_no_finished_run(run, undisturbed, small_disk):
    ended = run.start(fill_disk(small_disk, at_step=11))
    assert ended.code == 1
    status = run.status()
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 12, 1)
    assert FULL in status["reason"]
    assert "the steps since the last checkpoint are not saved" in status["reason"]
    assert not run.litter()
    make_room(small_disk)
    run.finish()
    run.equals(undisturbed)


def test_the_last_save_waits_a_moment_for_room(run, undisturbed, small_disk):
    def make_room_in_the_first_pause():
        from dist_trainer.training import saving

        class Clock:
            @staticmethod
            def sleep(_seconds):
                if (small_disk / "ballast").exists():
                    make_room(small_disk)

        saving.time = Clock

    ended = run.start(make_room_in_the_first_pause, fill_disk(small_disk, at_step=11))
    assert ended.code == 0, ended.said
    assert f"step 12: the checkpoint {FULL}" in ended.said
    assert run.status()["state"] == "finished"
    run.equals(undisturbed)


def test_a_run_cannot_start_on_a_full_disk(run, small_disk):
    fill(small_disk)
    ended = run.start()
    assert ended.code == 2, ended.said
    assert "No space left on device" in ended.said
    assert "Traceback" not in ended.said


def test_a_run_that_finds_the_disk_full_at_its_start_resumes_from_what_it_has(run, undisturbed, small_disk):
    assert run.start(do(lambda _: os._exit(77), at_step=8)).code == 77
    fill(small_disk)
    ended = run.start(free_disk(small_disk, at_step=8))
    assert ended.code == 0, ended.said
    run.equals(undisturbed)


@pytest.mark.parametrize("room", [0, 1, 4, 8, 16, 32, 64, 100, 150, 200, 250])
def test_a_save_that_finds_room_for_a_part_of_it_leaves_no_files(small_disk, room):
    saver = Saver(small_disk / "run")
    saver.save(3, 6)
    before = contents(saver.checkpoints)
    fill(small_disk)
    make_room(small_disk, just=room << 10)
    error = saver.save(9).last_error
    assert error == f"step 9: the checkpoint {FULL}"
    assert contents(saver.checkpoints) == before
    make_room(small_disk)
    assert saver.save(9).last_error is None
    assert saver.start() == 9
    assert saver.litter() == []
