"""Which rank a process is, from variables that launchers, and others, set."""

import pytest

from dist_trainer.distributed.launch_env import Place, place_of_this_process
from dist_trainer.errors import ConfigError
from dist_trainer.run.configure import load_config

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", **MEETING}
SRUN = {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place()),
        ({"WORLD_SIZE": "3"}, Place()),
        ({"RANK": "1"}, Place()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, Place(1, 1, 2, 2)),
        (TORCHRUN, Place(5, 1, 8, 4)),
        (SRUN, Place()),
        ({**SRUN, **MEETING}, Place(2, 0, 4, 2)),
        ({**SRUN, **MEETING, "SLURM_LOCALID": "2"}, Place(2, 2, 4, 2)),
        ({**SRUN, **TORCHRUN}, Place(5, 1, 8, 4)),
    ],
)
def test_the_launcher_s_variables_count_and_half_of_them_mean_nothing(environment, place):
    assert place_of_this_process(environment) == place


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
def test_variables_that_make_no_sense_are_refused_with_the_rest_of_the_config(environment, complaint, monkeypatch):
    with pytest.raises(ConfigError, match=complaint):
        place_of_this_process(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"(?s)2 problems.*seed: 'x'.*{complaint}"):
        load_config(["--seed", "x"])
