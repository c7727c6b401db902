"""SIGKILL at any instant: the same command goes on, and nothing shows that anything has happened."""

import json
import os
import random

import pytest

from tests.faults.conftest import a_run
from tests.faults.faults import await_writes, count_operations, do, kill, kill_in_save
from tests.faults.many_kills import kill_at_a_random_instant, kill_at_any_time, seconds_of
from tests.faults.processes import busy_machine, children_of, is_alive, wait_until


@pytest.mark.parametrize("step", [1, 7, 12])
def test_a_run_that_is_killed_resumes_from_its_last_checkpoint(run, undisturbed, step):
    assert run.start(await_writes, kill(at_step=step)).was_killed
    run.finish()
    # What was due is saved, but for the save that was in flight.
    assert run.resumed_at()[-1] >= step - step % 3 - 3
    run.equals(undisturbed)


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(run, undisturbed):
    for step in (2, 4, 6, 6, 8, 11):
        assert run.start(kill(at_step=step)).was_killed
    run.finish()
    run.equals(undisturbed)


def test_a_run_that_is_killed_at_random_instants_ends_as_if_nothing_had_happened(run, undisturbed):
    rng = random.Random(1)
    for number in range(8):
        kill_at_a_random_instant(run, rng, while_saving=number % 2 == 0)
    run.finish()
    run.equals(undisturbed)


@pytest.mark.parametrize(("ranks", "kills"), [(1, 6), (2, 4)])
def test_a_run_that_is_killed_at_any_time_from_its_start_to_its_end_resumes_too(run, text, tmp_path, ranks, kills):
    """Also while it prepares, restores or leaves; of several ranks all at once."""
    rng = random.Random(ranks)
    undisturbed = a_run(text, tmp_path / "undisturbed")
    seconds = seconds_of(lambda: undisturbed.begin(ranks=ranks))
    for _ in range(kills):
        kill_at_any_time(run.begin(ranks=ranks), rng, seconds=seconds)
    run.finish(ranks=ranks)
    run.equals(undisturbed)


def test_kills_on_a_busy_machine_are_survived_as_well(run, undisturbed):
    rng = random.Random(3)
    with busy_machine():
        for number in range(2):
            kill_at_a_random_instant(run, rng, while_saving=number % 2 == 0)
        run.finish()
    run.equals(undisturbed)


def test_dying_at_operations_of_a_save_inside_a_run_loses_nothing(run, undisturbed):
    total = count_operations(run, of_step=9)
    assert total > 40
    run.delete()
    for operation in (0, total // 3, total - 1):
        assert run.start(kill_in_save(of_step=9, at_operation=operation)).was_killed
    run.finish()
    run.equals(undisturbed)


def test_metrics_never_lag_the_newest_checkpoint(run):
    for step in (4, 7, 10):
        assert run.start(kill(at_step=step)).was_killed
        newest = max(run.saved_steps(), default=0)  # none where the first save was in flight
        assert [line["step"] for line in run.lines()][:newest] == list(range(1, newest + 1))


def test_processes_that_read_data_do_not_outlive_the_run_nor_block_the_next(run, undisturbed):
    config = run.but(data__num_workers=2)
    note = run.folder.parent / "workers.json"

    def note_workers(_):
        note.write_text(json.dumps(children_of(os.getpid())))

    assert run.start(do(note_workers, at_step=7), kill(at_step=7), config=config).was_killed
    workers = json.loads(note.read_text())
    assert len(workers) >= 2
    run.finish()
    run.equals(undisturbed)
    wait_until(lambda: not any(is_alive(worker) for worker in workers), seconds=10)
