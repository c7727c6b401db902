"""Which rank a process is, from variables that launchers, and others, set; and whether its launcher is alive."""

import os
import subprocess
import sys

import pytest

from dist_trainer.distributed import launch_env
from dist_trainer.distributed.launch_env import LAUNCHER_PID, PORT, RankInfo, living_launcher, rank_info, rendezvous_endpoint
from dist_trainer.errors import ConfigError, PeerLostError
from dist_trainer.run.configure import load_config

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", **MEETING}
SRUN = {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("environment", "info"),
    [
        ({}, RankInfo()),
        ({"WORLD_SIZE": "3"}, RankInfo()),
        ({"RANK": "1"}, RankInfo()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, RankInfo()),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, RankInfo(1, 1, 2, 2)),
        (TORCHRUN, RankInfo(5, 1, 8, 4)),
        (SRUN, RankInfo()),
        ({**SRUN, **MEETING}, RankInfo(2, 0, 4, 2)),
        ({**SRUN, **MEETING, "SLURM_LOCALID": "2"}, RankInfo(2, 2, 4, 2)),
        ({**SRUN, **TORCHRUN}, RankInfo(5, 1, 8, 4)),
        ({**SRUN, **MEETING, "SLURM_STEP_NUM_TASKS": "5"}, RankInfo(2, 0, 5, 3)),
    ],
)
def test_the_launcher_s_variables_count_and_half_of_them_mean_nothing(environment, info):
    assert rank_info(environment) == info


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"RANK": "0", "WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', not a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "LOCAL_RANK is '', not a whole number"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({**SRUN, "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({**TORCHRUN, "MASTER_PORT": "29501/tcp"}, "MASTER_PORT is '29501/tcp', not a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT is 0, but ports are numbered from 1 to 65535"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000, but ports"),
    ],
)
def test_variables_that_make_no_sense_are_rejected_with_the_rest_of_the_config(environment, complaint, monkeypatch):
    with pytest.raises(ConfigError, match=complaint):
        rank_info(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"(?s)2 problems.*seed: 'x'.*{complaint}"):
        load_config(["--seed", "x"])


@pytest.mark.parametrize(
    ("environment", "ports"),
    [
        (MEETING, (29500, 0)),
        ({**MEETING, PORT: "29600"}, (29600, 29601)),
        ({**MEETING, "TORCHELASTIC_USE_AGENT_STORE": "True"}, (29500, 0)),
        ({**MEETING, PORT: "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}, (29500, 29501)),
    ],
)
def test_the_heartbeat_s_port_is_the_next_one_only_if_a_launch_file_has_chosen_the_first(environment, ports):
    """Otherwise the next one may be in use, and any free one does."""
    endpoint = rendezvous_endpoint(environment)
    assert (endpoint.port, endpoint.heartbeat_port) == ports


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_the_parent_is_the_launcher_that_the_launch_files_name():
    assert living_launcher({LAUNCHER_PID: str(os.getppid())}) == os.getppid()


def test_another_parent_means_that_the_launcher_has_ended():
    gone = ended_process()
    with pytest.raises(PeerLostError, match=rf"the launcher \(pid {gone}\) is gone"):
        living_launcher({LAUNCHER_PID: str(gone)})


def test_a_launcher_started_by_a_wrapper_is_as_good():
    """PYTHON may be a script that starts Python and stays; it is that which the launch file becomes."""
    assert living_launcher({LAUNCHER_PID: str(os.getpid())}) == os.getppid()


@pytest.mark.parametrize(
    ("first_process", "is_alive"),
    [
        (["/sbin/init"], False),
        (["/lib/systemd/systemd", "--system"], False),
        ([], False),
        (["/usr/bin/python3.11", "/usr/local/bin/torchrun", "-m", "dist_trainer.train"], True),
        (["python", "start_ranks.py"], True),
    ],
)
def test_in_a_container_the_first_process_may_be_a_launcher(monkeypatch, first_process, is_alive):
    monkeypatch.setattr(launch_env.os, "getppid", lambda: 1)
    monkeypatch.setattr(launch_env, "command_of", lambda pid: first_process)
    if is_alive:
        assert living_launcher({}) == 1
    else:
        with pytest.raises(PeerLostError, match="the launcher is gone"):
            living_launcher({})


def test_a_rank_may_open_as_many_files_as_the_system_allows():
    """Rank 0 of some hundred ranks needs more than the usual 1,024."""
    code = """
import resource
from dist_trainer.distributed.launch_env import begin_as_rank
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
