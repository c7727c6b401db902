"""One job per run folder: the owner is named, and a dead one holds nothing."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import time

import pytest

from dist_trainer.errors import CheckpointError
from dist_trainer.storage import locks
from dist_trainer.storage.locks import LOCK_FILE, Owner, RunLock


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "ALIVE_OWNER_SECONDS", 0.1)


def in_a_child(act) -> int:
    """The exit code of a forked process that does `act`."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except CheckpointError:
            os._exit(2)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_second_job_is_rejected_within_seconds_by_naming_the_first(tmp_path):
    lock = RunLock(tmp_path)
    began = time.monotonic()
    with pytest.raises(CheckpointError) as refused:
        RunLock(tmp_path)
    assert time.monotonic() - began < 10
    assert re.search(
        rf"host {socket.gethostname()}, pid {os.getpid()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)", str(refused.value)
    )
    lock.release()
    RunLock(tmp_path).release()


def test_the_lock_of_a_killed_process_does_not_block(tmp_path):
    def take_it_and_die() -> None:
        RunLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(take_it_and_die) == -signal.SIGKILL
    assert "pid" in (tmp_path / LOCK_FILE).read_text()
    began = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - began < 1


def test_a_forked_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    reader, writer = os.pipe()

    def take_it_fork_and_die() -> None:
        RunLock(tmp_path)
        if os.fork() == 0:
            os.read(reader, 1)  # lives until the test is done
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(take_it_fork_and_die)
    RunLock(tmp_path).release()
    os.write(writer, b"x")
    os.close(writer)
    os.close(reader)


def test_a_program_that_the_job_has_started_does_not_hold_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE):
        lock.release()
        RunLock(tmp_path).release()


def test_a_child_may_let_go_without_taking_the_lock_from_its_parent(tmp_path, impatient):
    lock = RunLock(tmp_path)
    assert in_a_child(lambda: None) == 0
    assert in_a_child(lambda: RunLock(tmp_path)) == 2
    lock.release()


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"host x, pid 99999999999999999999, since y\n", b"x" * 10_000])
def test_the_content_of_the_file_does_not_matter(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    RunLock(tmp_path).release()
    assert re.fullmatch(rf"host .*, pid {os.getpid()}, since .*\n", (tmp_path / LOCK_FILE).read_text())


def test_a_holder_that_names_no_one_is_still_one(tmp_path, impatient):
    with (tmp_path / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="owner unknown"):
            RunLock(tmp_path)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to(victim)
    with pytest.raises(CheckpointError, match="symbolic link"):
        RunLock(tmp_path)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EPERM])
def test_on_a_file_system_without_locks_a_running_job_is_found_by_name(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks.log, "propagate", True)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as neighbour:
        (tmp_path / LOCK_FILE).write_text(f"{Owner(socket.gethostname(), neighbour.pid, 'noon')}\n")
        with pytest.raises(CheckpointError, match=f"pid {neighbour.pid}, since noon"):
            RunLock(tmp_path)
    RunLock(tmp_path).release()


def test_a_folder_that_was_removed_and_made_again_is_another_one(tmp_path, impatient):
    lock = RunLock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    other = RunLock(tmp_path)
    with pytest.raises(CheckpointError, match="in use"):
        RunLock(tmp_path)
    other.release()
    lock.release()


def test_a_zombie_does_not_seem_to_live():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    owner = Owner(socket.gethostname(), pid, "now")
    assert not owner.seems_alive()
    os.waitpid(pid, 0)
    assert not owner.seems_alive()
    assert Owner("elsewhere", pid, "now").seems_alive()
    assert Owner.this_process().seems_alive()
