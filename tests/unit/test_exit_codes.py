"""A config error reaches the user whatever the launcher does meanwhile."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.pace import allowed

RANKS = 3
# As each rank of one machine; the slow one is still loading when the others have found the error.
CODE = """
import sys, time
from dist_trainer.config import loading
from dist_trainer.train import main
load = loading.load_config
def slowly(argv):
    print("loading", flush=True)
    time.sleep(float(sys.argv[1]))
    return load(argv)
loading.load_config = slowly
sys.exit(main(["--seed", "x"]))
"""


def start(rank: int, *, seconds: float = 0.0, local_rank: int | None = None) -> subprocess.Popen[str]:
    local_rank = rank if local_rank is None else local_rank
    settings = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(seconds)],
        env={**os.environ, **settings, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    return process


def test_a_config_error_is_said_once_though_the_first_rank_to_leave_has_the_others_stopped():
    ranks = [start(rank, seconds=0.5 if rank == 0 else 0.0) for rank in range(RANKS)]
    while all(rank.poll() is None for rank in ranks):
        time.sleep(0.01)
    for rank in ranks:  # as torchrun does
        rank.terminate()
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2, 2]
    assert said[0].count("seed: 'x' is not a whole number") == 1
    assert said[1:] == ["", ""]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_config_error_wins_over_a_signal_while_loading(number):
    rank = start(0, seconds=1.0)
    rank.send_signal(number)
    assert "seed: 'x' is not a whole number" in rank.communicate()[1]
    assert rank.returncode == 2


def test_the_first_rank_of_a_second_machine_says_it_too():
    rank = start(2, local_rank=0)
    assert "seed: 'x' is not a whole number" in rank.communicate()[1]
    assert rank.returncode == 2


def test_a_rank_that_holds_back_leaves_at_once_at_a_signal_and_in_a_while_without():
    hurried, patient = start(1), start(2)
    time.sleep(0.5)
    assert hurried.poll() is None
    hurried.terminate()
    for rank, seconds in ((hurried, 3), (patient, 30)):
        assert rank.communicate(timeout=allowed(seconds)) == ("", "")
        assert rank.returncode == 2
