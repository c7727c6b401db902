"""A signal to the one process of a run: saved at that very step, out soon, nothing lost; wherever the run stands."""

import fcntl
import json
import os
import signal
import sys
import termios

import pytest

from dist_trainer.checkpoint import manager
from dist_trainer.run.record import RunRecord
from dist_trainer.training import trainer
from tests.faults.conftest import a_run
from tests.faults.faults import before_each_call, do
from tests.faults.processes import wait_until


def send(*numbers, at_step):
    """These signals, when step `at_step` is done."""
    return do(lambda _: [os.kill(os.getpid(), number) for number in numbers], at_step=at_step)


@pytest.mark.usefixtures("not_under_nohup")
@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGTERM], [signal.SIGUSR1], [signal.SIGINT], [signal.SIGHUP], [signal.SIGUSR1, signal.SIGTERM]],
    ids=["TERM", "USR1", "INT", "HUP", "two"],
)
def test_a_signal_saves_that_very_step_and_loses_none(run, undisturbed, numbers):
    assert run.start(send(*numbers, at_step=7)).code == 75
    status = run.status()
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert status["step"] in (7, 8)
    assert run.newest().name == f"step-{status['step']:08d}"
    run.finish()
    assert run.resumed_at()[-1] == status["step"]
    run.equals(undisturbed)


@pytest.mark.usefixtures("not_under_nohup")
def test_a_terminal_that_is_closed_loses_nothing(run, undisturbed, tmp_path):
    """The kernel sends SIGHUP, and whatever is printed after that fails."""
    master, slave = os.openpty()
    trains = tmp_path / "trains"

    def take_terminal():
        os.close(master)
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for descriptor in (0, 1, 2):
            os.dup2(slave, descriptor)
        os.close(slave)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115

    def wait_for_the_end_of_the_terminal(trainer):
        trains.touch()
        wait_until(lambda: bool(trainer.world.stop_request))
        with pytest.raises(OSError, match="Input/output error"):
            os.write(2, b"x")

    process = run.begin(take_terminal, do(wait_for_the_end_of_the_terminal, at_step=7))
    os.close(slave)
    wait_until(trains.exists, of=process)
    os.close(master)
    assert process.wait().code == 75
    status = run.status()
    assert (status["state"], status["reason"]) == ("preempted", "SIGHUP")
    run.finish()
    assert run.resumed_at()[-1] == status["step"]
    run.equals(undisturbed)


def test_a_third_signal_ends_at_once_and_the_run_resumes_from_its_last_checkpoint(run, undisturbed):
    three = [signal.SIGTERM] * 3
    assert run.start(send(*three, at_step=7)).code == 128 + signal.SIGTERM
    run.finish()
    run.equals(undisturbed)


def test_signals_while_the_outcome_is_recorded_do_not_change_it(run):
    def impatience():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)

    faults = [send(signal.SIGTERM, at_step=7), before_each_call(impatience, RunRecord, "finish")]
    assert run.start(*faults).code == 75
    assert run.status()["state"] == "preempted"


def test_a_signal_during_validation_and_one_during_a_save_lose_nothing(run, undisturbed):
    def ask():
        os.kill(os.getpid(), signal.SIGTERM)

    assert run.start(before_each_call(ask, trainer, "evaluate")).code == 75
    assert run.status()["step"] == 5
    assert run.start(before_each_call(ask, manager, "publish")).code == 75
    run.finish()
    run.equals(undisturbed)


def test_a_signal_while_data_are_prepared_breaks_it_off(tmp_path):
    number = signal.SIGINT
    text, cache = tmp_path / "text.jsonl", tmp_path / "cache"
    line = json.dumps({"text": "It is a truth universally acknowledged, that a single man must want a wife. " * 40})
    text.write_text((line + "\n") * 15_000)
    run = a_run(text, tmp_path / "runs", data__cache_dir=str(cache))
    process = run.begin()
    wait_until(lambda: any(path.is_file() for path in cache.rglob("*")), of=process)
    process.kill(number)
    assert process.wait(seconds=10).code == 75
    status = run.status()
    assert (status["state"], status["reason"]) == ("preempted", number.name)
