"""Whether the launcher of a rank lives, where the rank's parent may be a foster parent."""

import os
import subprocess
import sys

import pytest

from dist_trainer.distributed import launcher
from dist_trainer.distributed.launcher import LAUNCHER_PID, living_launcher
from dist_trainer.errors import PeerLostError


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_the_parent_is_the_launcher_that_the_launch_files_name():
    assert living_launcher({LAUNCHER_PID: str(os.getppid())}) == os.getppid()


def test_another_parent_is_a_foster_parent_where_the_launcher_has_ended():
    gone = ended_process()
    with pytest.raises(PeerLostError, match=rf"the launcher \(pid {gone}\) is gone"):
        living_launcher({LAUNCHER_PID: str(gone)})


def test_a_launcher_started_by_a_wrapper_is_as_good():
    """PYTHON may be a script that starts Python and stays; it is that which the launch file becomes."""
    assert living_launcher({LAUNCHER_PID: str(os.getpid())}) == os.getppid()


@pytest.mark.parametrize(
    ("first_process", "lives"),
    [
        (["/sbin/init"], False),
        (["/lib/systemd/systemd", "--system"], False),
        ([], False),
        (["/usr/bin/python3.11", "/usr/local/bin/torchrun", "-m", "dist_trainer.train"], True),
        (["python", "start_ranks.py"], True),
    ],
)
def test_in_a_container_the_first_process_may_be_a_launcher(monkeypatch, first_process, lives):
    monkeypatch.setattr(launcher.os, "getppid", lambda: 1)
    monkeypatch.setattr(launcher, "command_of", lambda pid: first_process)
    if lives:
        assert living_launcher({}) == 1
    else:
        with pytest.raises(PeerLostError, match="the launcher is gone"):
            living_launcher({})


def test_a_rank_may_open_as_many_files_as_the_system_allows():
    """Rank 0 of some hundred ranks needs more than the usual 1,024."""
    code = """
import resource
from dist_trainer.distributed.launcher import begin_as_rank
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
begin_as_rank()
soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
print(soft == min(hard, 65_536) if hard != resource.RLIM_INFINITY else soft == 65_536)
"""
    rank = {"TORCHELASTIC_RUN_ID": "7", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    settings = {**os.environ, **rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", LAUNCHER_PID: str(os.getpid())}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr
