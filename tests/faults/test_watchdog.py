"""The guard beside a rank: it ends one that is frozen, and nothing else."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dist_trainer.distributed.launcher import begin_as_rank
from dist_trainer.distributed.watchdog import watch
from tests.faults.processes import children_of, is_alive, wait_until
from tests.pace import allowed

RANK = """
import threading, time
from dist_trainer.distributed import watchdog
watched = watchdog.Guard()
watched.patience_seconds = lambda: {seconds} - watchdog.MARGIN_SECONDS
time.sleep(2 * watchdog.TELL_SECONDS)  # it has been told
print("ready", flush=True)
input()
{then}
"""
SLEEPS = "time.sleep(60)"


@pytest.fixture
def rank(request):
    """A process with a guard, and the guard."""
    words = [sys.executable, "-c", RANK.format(then=getattr(request, "param", SLEEPS), seconds=allowed(1.0))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        (guard,) = children_of(process.pid)
        process.stdin.write(b"go on\n")
        process.stdin.flush()
        yield process, guard
        process.kill()


def test_a_frozen_rank_is_ended(rank):
    process, guard = rank
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: process.poll() is not None, seconds=10)
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: not is_alive(guard), seconds=5)


def test_a_rank_whose_main_thread_waits_for_long_is_let_live(rank):
    process, _ = rank
    time.sleep(5)
    assert process.poll() is None


def test_the_guard_reads_a_pipe_whatever_its_descriptor_is(many_open_files):
    reading, writing = os.pipe()
    assert reading > 1023
    os.close(writing)
    watch(os.getppid(), reading)
    os.close(reading)


@pytest.mark.slow
def test_a_job_that_was_suspended_as_a_whole_and_goes_on_is_let_live(rank):
    process, guard = rank
    for pid in (process.pid, guard):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    for pid in (guard, process.pid):
        os.kill(pid, signal.SIGCONT)
    time.sleep(4)
    assert process.poll() is None


@pytest.mark.parametrize("rank", ["import os; os.fork() or time.sleep(8); time.sleep(60)"], indirect=True)
def test_the_guard_leaves_with_its_rank_though_a_data_worker_stays(rank):
    process, guard = rank
    wait_until(lambda: len(children_of(process.pid)) == 2, seconds=5)
    (worker,) = set(children_of(process.pid)) - {guard}
    process.kill()
    try:
        wait_until(lambda: not is_alive(guard), seconds=5)
        assert is_alive(worker)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_signals_to_all_processes_of_a_rank_leave_the_guard_at_its_post(rank):
    process, guard = rank
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(guard, number)
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: process.poll() is not None, seconds=10)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("environment", [{}, {"TORCHELASTIC_RUN_ID": "7", "RANK": "0", "WORLD_SIZE": "1"}])
def test_a_process_alone_has_no_guard_and_may_be_stopped(monkeypatch, environment):
    """By Ctrl-Z, to go on later."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DIST_TRAINER_LAUNCHER_PID", str(os.getppid()))
    assert begin_as_rank() is None
