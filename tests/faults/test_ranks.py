"""A rank dies, hangs, or is left alone by its launcher: the others exit soon, name it, and the run can be resumed."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dist_trainer.run.record import RunRecord
from tests.distributed.small_runs import (
    at_each_validation_batch,
    command,
    folder,
    losses,
    on_rank,
    same_weights,
    small_config,
    status,
)
from tests.pace import allowed

SECONDS_TO_LEAVE = 10
SECONDS_TO_LEAVE_A_HANGING_RANK = 20


def at_step(step, *, rank, act):
    """Let `rank` do `act` in place of its step number `step`, when the others know that it has come there."""

    def change(trainer):
        train_step = trainer.train_step

        def step_or_fault(*arguments):
            if trainer.progress.step == step - 1 and trainer.world.rank == rank:
                wait_until_sent(trainer)
                Path(trainer.config.output_dir, "fault.txt").write_text(str(time.time()))
                act()
            return train_step(*arguments)

        trainer.train_step = step_or_fault

    return change


def wait_until_sent(trainer) -> None:
    """Some beats more: the others have read the first of them by then."""
    heartbeat = trainer.world.heartbeat
    while heartbeat.peers.last_sent.step != trainer.progress.step:
        time.sleep(0.01)
    first = heartbeat.peers.last_sent.number
    while heartbeat.peers.last_sent.number < first + 6:
        time.sleep(0.01)


def kill(*, rank, at):
    return at_step(at, rank=rank, act=lambda: os.kill(os.getpid(), signal.SIGKILL))


def freeze(*, rank, at):
    return at_step(at, rank=rank, act=lambda: os.kill(os.getpid(), signal.SIGSTOP))


def crash(*, rank, at):
    def raise_an_error():
        raise ZeroDivisionError("one over nothing")

    return at_step(at, rank=rank, act=raise_an_error)


def get_stuck_reading_data(*, rank, at):
    def change(trainer):
        fetch = trainer._fetch

        def fetch_or_wait(batches):
            if trainer.progress.step == at and trainer.world.rank == rank:
                wait_until_sent(trainer)
                threading.Event().wait()
            return fetch(batches)

        trainer._fetch = fetch_or_wait

    return change


def seconds_since_the_fault(config) -> float:
    return time.time() - float(Path(config.output_dir, "fault.txt").read_text())


def said(config) -> str:
    return "".join(path.read_text() for path in Path(folder(config), "logs").glob("rank-*.log"))


def goes_on_as_if_nothing_had_happened(config, undisturbed) -> None:
    assert command(config, 2) == [0, 0]
    assert losses(config) == losses(undisturbed)
    assert same_weights(config, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_takes_the_others_with_it_within_seconds(stories, undisturbed_by_two, tmp_path, rank):
    config = small_config(stories, tmp_path / "run")
    codes = command(config, 2, before=kill(rank=rank, at=7))
    assert seconds_since_the_fault(config) < allowed(SECONDS_TO_LEAVE)
    assert codes == ([-9, 1] if rank == 0 else [1, -9])
    if rank == 1:
        assert status(config)["state"] == "failed"
        assert status(config)["exit_code"] == 1
        assert "rank 1 on " in status(config)["reason"]
        assert "is gone (last seen in step" in status(config)["reason"]
    goes_on_as_if_nothing_had_happened(config, undisturbed_by_two)


def test_a_rank_that_crashes_reports_why_and_the_others_do_not_hide_it(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path / "run")
    assert command(config, 2, before=crash(rank=1, at=7)) == [1, 1]
    printed = capfd.readouterr().err
    assert "ZeroDivisionError: one over nothing" in printed
    assert printed.count("Traceback") == 1
    assert "rank 1 on " in status(config)["reason"]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_and_all_leave_after_the_timeout(stories, undisturbed_by_two, tmp_path, rank):
    config = small_config(stories, tmp_path / "run", distributed__hang_timeout_minutes=0.1)
    codes = command(config, 2, before=freeze(rank=rank, at=7))
    assert 6 - 1 < seconds_since_the_fault(config) < 6 + allowed(SECONDS_TO_LEAVE_A_HANGING_RANK)
    assert codes == ([-9, 1] if rank == 0 else [1, -9])
    lines = [line for line in said(config).splitlines() if f"rank {rank} on {os.uname().nodename}" in line]
    assert len(lines) == 1
    assert "stopped responding for" in lines[0]
    assert "(last seen in step 7, training)" in lines[0]
    assert status(config)["state"] == "failed"
    assert "stopped responding" in status(config)["reason"]
    goes_on_as_if_nothing_had_happened(config, undisturbed_by_two)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_of_four_ranks_the_one_that_hangs_is_named_and_none_that_left_for_it(stories, tmp_path, rank):
    config = small_config(stories, tmp_path / "run", distributed__hang_timeout_minutes=0.1)
    codes = command(config, 4, before=freeze(rank=rank, at=7))
    assert codes == [-9 if each == rank else 1 for each in range(4)]
    assert said(config).count("(last seen in step ") == 1
    assert f"rank {rank} on {os.uname().nodename}" in status(config)["reason"]
    assert "stopped responding" in status(config)["reason"]


def test_a_rank_whose_main_thread_is_stuck_is_named_too(stories, tmp_path):
    config = small_config(stories, tmp_path, distributed__hang_timeout_minutes=0.1)
    codes = command(config, 2, before=get_stuck_reading_data(rank=1, at=6))
    assert codes == [1, -9]
    assert status(config)["reason"].startswith("rank 1 on ")
    assert "made no progress for" in status(config)["reason"]
    assert "(last seen in step 7, reading data)" in status(config)["reason"]


def note_progress_of(trainer, notes):
    """What the main thread says, as (step, phase)."""
    heartbeat = trainer.world.heartbeat
    mark = heartbeat.mark

    def note_and_say(phase, *, step=None):
        notes.append((trainer.progress.step, phase))
        mark(phase, step=step)

    heartbeat.mark = note_and_say


def test_each_micro_batch_each_fetched_batch_and_each_validation_batch_is_progress(stories, tmp_path):
    config = small_config(stories, tmp_path, batch__micro_batch_size=1, train__max_steps=3)
    notes_of_rank = tmp_path / "notes.json"

    def change(trainer):
        notes = []
        note_progress_of(trainer, notes)
        finish = RunRecord.finish

        def finish_and_note(*arguments, **how):
            validated = trainer.validation_data.sampler
            notes_of_rank.write_text(json.dumps({"notes": notes, "blocks": len(list(validated))}))
            finish(*arguments, **how)

        RunRecord.finish = finish_and_note

    assert command(config, 2, before=on_rank(0, change)) == [0, 0]
    noted = json.loads(notes_of_rank.read_text())
    notes = [tuple(note) for note in noted["notes"]]
    for step in (0, 1, 2):
        assert notes.count((step, "training")) == 1 + 3, "when the step begins, and after each micro-batch but the last"
        assert notes.count((step, "backward")) == 1
    for step in (1, 2):
        assert notes.count((step, "reading data")) >= 4
    assert notes.count((3, "validating")) >= noted["blocks"] > 1
    assert (3, "summing losses") in notes


def sleep_in_each_micro_batch(trainer):
    loss_function = trainer.loss_function

    def slow(model, batch):
        time.sleep(1.0 if model.training else 0.0)
        return loss_function(model, batch)

    trainer.loss_function = slow


def sleep_in_each_read(trainer):
    data = trainer.train_data

    class Slow:
        dataset, sampler = data.dataset, data.sampler

        def __iter__(self):
            for batch in data:
                time.sleep(1.0)
                yield batch

    trainer.train_data = Slow()


def sleep_for_longer_than_the_timeout(trainer):
    loss_function = trainer.loss_function

    def slow(model, batch):
        time.sleep(9.0)
        return loss_function(model, batch)

    trainer.loss_function = slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slow", "micro_batch_size"),
    [
        pytest.param(sleep_in_each_micro_batch, 1, id="many micro-batches"),
        pytest.param(sleep_in_each_read, 1, id="slow reads"),
        pytest.param(at_each_validation_batch(lambda: time.sleep(1.5)), 1, id="slow validation"),
        pytest.param(sleep_for_longer_than_the_timeout, 8, id="all ranks in one micro-batch"),
    ],
)
def test_healthy_ranks_whose_steps_take_longer_than_the_timeout_finish(stories, tmp_path, slow, micro_batch_size):
    batch = {"batch__global_batch_size": 16, "batch__micro_batch_size": micro_batch_size}
    config = small_config(stories, tmp_path, distributed__hang_timeout_minutes=0.1, train__max_steps=1, **batch)
    began = time.monotonic()
    assert command(config, 2, before=slow) == [0, 0]
    assert time.monotonic() - began > 7.0
