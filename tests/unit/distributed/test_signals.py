import os
import signal
import subprocess
import sys
import time

import pytest

from dist_trainer.checkpoint.state import Progress
from dist_trainer.distributed import signals
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.distributed.signals import SECONDS_TO_RAISE_AGAIN, STOP_SIGNALS, StopRequest
from dist_trainer.errors import LauncherLostError, StoppedError, signal_name
from dist_trainer.training.saving import result_when_stopped


@pytest.mark.usefixtures("not_under_nohup")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_a_flag_and_nothing_else(number):
    with StopRequest().listen() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_number == number


def test_a_second_signal_does_no_harm_and_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().listen() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGUSR1, "the first is the reason"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_process_that_is_about_to_exit_ignores_signals_for_good(number):
    before = {stop_signal: signal.getsignal(stop_signal) for stop_signal in STOP_SIGNALS}
    try:
        with StopRequest().listen(for_good=True):
            pass
        os.kill(os.getpid(), number)  # would end pytest
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        for stop_signal, handler in before.items():
            signal.signal(stop_signal, handler)


def test_the_third_signal_ends_the_process_at_once():
    code = """
import os, signal
from dist_trainer.distributed.signals import StopRequest
with StopRequest().listen():
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert "still here" not in done.stdout


def test_signals_of_a_terminal_that_is_closed_are_not_counted_as_impatience():
    code = """
import os, signal
from dist_trainer.distributed.signals import StopRequest
with StopRequest().listen() as stop:
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        os.kill(os.getpid(), number)
print(bool(stop))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n")


def test_a_hang_up_that_was_ignored_at_the_start_is_ignored_as_nohup_means_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().listen() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_launcher_that_is_gone_asks_to_stop_and_a_signal_is_the_better_reason():
    stop = StopRequest()
    stop.note_lost_launcher("the launcher (pid 7) is gone")
    assert stop
    with pytest.raises(LauncherLostError, match=r"the launcher \(pid 7\) is gone; step 4 is saved"):
        result_when_stopped(Progress(4), DistributedContext(stop_request=stop))
    stop.signal_number = signal.SIGUSR1
    assert result_when_stopped(Progress(4), DistributedContext(stop_request=stop)).signal_number == signal.SIGUSR1


def test_the_third_signal_ends_also_a_process_that_hangs_outside_python():
    code = """
import ctypes, os, subprocess
from dist_trainer.distributed.signals import StopRequest
with StopRequest().listen():
    subprocess.Popen(["sh", "-c", f"for _ in 1 2 3; do kill -TERM {os.getpid()}; sleep 0.1; done"])
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)  # for ever, whatever signals come
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM


def test_a_signal_to_a_forked_worker_does_not_count_for_its_parent():
    with StopRequest().listen():
        for _ in range(3):
            worker = os.fork()
            if worker == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(0)
            os.waitpid(worker, 0)


def test_listening_ends_while_a_forked_worker_is_alive():
    reading, writing = os.pipe()
    with StopRequest().listen():
        worker = os.fork()
        if worker == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    os.close(writing)
    os.waitpid(worker, 0)


def test_signals_have_names():
    assert signal_name(15) == "SIGTERM"
    assert signal_name(0) == "signal 0"


def test_long_preparations_are_broken_off():
    went_on = False

    def work():
        nonlocal went_on
        os.kill(os.getpid(), signal.SIGUSR1)
        went_on = True

    with StopRequest().listen() as stop, pytest.raises(StoppedError), stop.interruptible():
        work()
    assert not went_on


def test_a_library_that_replaces_the_error_does_not_hide_the_signal():
    def library():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        except StoppedError as error:
            raise ValueError("something is wrong") from error

    with StopRequest().listen() as stop, pytest.raises(StoppedError), stop.interruptible():
        library()


def test_a_library_that_swallows_the_error_is_broken_off_all_the_same():
    """As torch does where it asks what the C++ compiler can do: any exception is its answer, and compilation goes on."""
    swallowed = []

    def library():
        for act in (lambda: os.kill(os.getpid(), signal.SIGTERM), compile_for_ever):
            try:
                act()
            except Exception as error:
                swallowed.append(error)
        compile_for_ever()

    def compile_for_ever():
        while True:
            time.sleep(0.01)

    with StopRequest().listen() as stop, pytest.raises(StoppedError), stop.interruptible():
        library()
    assert [type(error) for error in swallowed] == [StoppedError, StoppedError]
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert (interval, left > 10 * SECONDS_TO_RAISE_AGAIN or left == 0) == (0, True), "that of pytest's time limit again"


def test_what_cleans_up_after_the_signal_is_not_broken_off_in_turn():
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            time.sleep(3 * SECONDS_TO_RAISE_AGAIN)  # the timer's signals come meanwhile
            cleaned.append(True)

    with StopRequest().listen() as stop, pytest.raises(StoppedError), stop.interruptible():
        work()
    assert cleaned


def test_a_library_that_keeps_running_while_it_handles_the_error_is_interrupted_after_some_seconds(monkeypatch):
    monkeypatch.setattr(signals, "TICKS_TO_CLEAN_UP", 2)

    def library():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            while True:  # another way, inside the handler of the first one's failure
                time.sleep(0.01)

    with StopRequest().listen() as stop, pytest.raises(StoppedError), stop.interruptible():
        library()


def test_an_alarm_of_somebody_else_is_handed_on_and_stops_nothing():
    heard = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    try:
        with StopRequest().listen() as stop, stop.interruptible():
            os.kill(os.getpid(), signal.SIGALRM)
        assert heard == [signal.SIGALRM]
        os.kill(os.getpid(), signal.SIGALRM)
        assert heard == [signal.SIGALRM] * 2
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_signal_that_came_before_is_seen_at_the_next_preparation():
    with StopRequest().listen() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedError), stop.interruptible():
            raise AssertionError("not begun")
