"""SIGKILL at any instant: the same command goes on, and nothing shows that anything has happened."""

import random
import time

import pytest

from tests.faults.faults import Operations, during_save, kill, kill_in_save


@pytest.mark.parametrize("step", [1, 3, 7, 12])
def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(run, undisturbed, step):
    assert run.start(kill(at_step=step)).was_killed
    run.finish()
    # What was due is saved, but for the save that was in flight.
    assert run.resumed_at()[-1] >= step - step % 3 - 3
    run.equals(undisturbed)


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(run, undisturbed):
    for step in (2, 4, 6, 6, 8, 9, 11):
        run.start(kill(at_step=step))
    run.finish()
    run.equals(undisturbed)


def test_a_run_that_is_killed_at_random_instants_ends_as_if_nothing_had_happened(run, undisturbed):
    rng = random.Random(6)
    for number in range(8):
        process = run.begin()
        before = run.logged_steps()
        if number % 2:  # inside the write of a checkpoint
            while process.is_running() and not any(run.checkpoints.glob(".staging-*")):
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.03))
        else:
            while process.is_running() and run.logged_steps() < before + 1:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.05))
        process.kill()
        ended = process.wait()
        assert ended.was_killed or ended.code == 0, ended.said
    run.finish()
    run.equals(undisturbed)


def count_operations_of_a_save(run, step):
    """By letting a run write down how far it counted."""
    note = run.folder.parent / "operations.txt"
    watch = []

    def lay():
        during_save(lambda: None, of_step=step, at_operation=-1)()
        before = Operations.__call__

        def count(self, *arguments):
            before(self, *arguments)
            if self not in watch:
                watch.append(self)
            if watch[0].count != getattr(count, "noted", 0):
                count.noted = watch[0].count
                note.write_text(str(watch[0].count))

        Operations.__call__ = count

    run.start(lay)
    return int(note.read_text())


def test_dying_at_operations_of_a_save_inside_a_run_loses_nothing(run, undisturbed):
    for operation in (0, 9, 23, 42, 60):
        run.start(kill_in_save(of_step=9, at_operation=operation))
    run.finish()
    run.equals(undisturbed)
