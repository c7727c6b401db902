"""Two machines under torchrun, without a scheduler: a rank dies, a rank hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.end_to_end.commands import lines, status
from tests.slurm.hosts import Hosts, ranks_of, said
from tests.slurm.jobs import SLOW_FROM_STEP, STEPS, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600, method="signal")]
TIMEOUT_MINUTES = 0.25
SECONDS_TO_LEAVE = 20


def wait_for_step(step: int, output: Path) -> None:
    metrics = output / "debug/metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(lines(metrics.parent)) >= step, failing=lambda: said(output))


def wait_for_end(launchers: list[subprocess.Popen[bytes]], output: Path, *, seconds: float = 180) -> list[int | None]:
    """How each launcher ended."""
    wait_until(lambda: all(one.poll() is not None for one in launchers), failing=lambda: said(output), seconds=seconds)
    return [launcher.returncode for launcher in launchers]


@pytest.mark.parametrize(("victim", "names"), [(0, "none resolves"), (3, "as Debian's installer has it"), (3, "IPv6")])
def test_a_run_on_two_nodes_is_back_by_itself_when_a_rank_is_killed(
    two_hosts: Hosts, undisturbed: Path, tmp_path: Path, victim: int, names: str
) -> None:
    """Rank 0 is on the first node, rank 3 on the second."""
    if names == "IPv6":
        two_hosts.give_them_only_ipv6()
    elif names != "none resolves":
        two_hosts.name_them_as_debian_does()
    output = tmp_path / "runs"
    with two_hosts.train(output, MAX_RESTARTS="3", SLOW_FROM_STEP=str(SLOW_FROM_STEP), SLOW_SECONDS="0.3") as launchers:
        wait_for_step(SLOW_FROM_STEP + 2, output)
        ranks_of(output)[victim].kill()
        assert wait_for_end(launchers, output) == [0, 0], said(output)
    assert [line["step"] for line in lines(output / "debug")] == list(range(1, STEPS + 1))
    for kind in ("train", "validation"):
        assert [line["loss"] for line in lines(output / "debug", kind)] == [line["loss"] for line in lines(undisturbed, kind)]
    assert status(output / "debug")["state"] == "finished"
    assert status(output / "debug")["restarts"] >= 1


def test_a_frozen_rank_on_the_other_node_is_named_and_all_leave(two_hosts: Hosts, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    patience = ("--distributed.hang_timeout_minutes", str(TIMEOUT_MINUTES))
    with two_hosts.train(output, *patience, SLOW_FROM_STEP=str(SLOW_FROM_STEP), SLOW_SECONDS="1") as launchers:
        wait_for_step(SLOW_FROM_STEP, output)
        ranks = ranks_of(output)
        assert sorted(ranks) == [0, 1, 2, 3]
        os.kill(ranks[3].pid, signal.SIGSTOP)
        frozen_at = time.monotonic()
        codes = wait_for_end(launchers, output, seconds=60 * TIMEOUT_MINUTES + SECONDS_TO_LEAVE)
        assert time.monotonic() - frozen_at > 60 * TIMEOUT_MINUTES - 3
        assert 0 not in codes
        assert not [rank for rank, process in ranks.items() if process.is_alive()]
    found = [line for path in output.glob("debug/logs/rank-*.log") for line in path.read_text().splitlines()]
    naming = [line for line in found if "rank 3 on node10" in line]
    assert len(naming) == 1, said(output)
    assert "stopped responding for" in naming[0]
    assert "(last seen in step" in naming[0]
    assert status(output / "debug")["state"] == "failed"
    assert naming[0].split(" ERROR   ")[1].startswith(status(output / "debug")["reason"])


@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_frozen_alone_on_its_node_is_named_by_the_other_and_leaves_when_it_continues(
    two_hosts: Hosts, tmp_path: Path, victim: int
) -> None:
    output = tmp_path / "runs"
    patience = ("--distributed.hang_timeout_minutes", str(TIMEOUT_MINUTES))
    slowly = {"SLOW_FROM_STEP": str(SLOW_FROM_STEP), "SLOW_SECONDS": "1"}
    with two_hosts.train(output, *patience, NPROC="1", **slowly) as launchers:
        wait_for_step(SLOW_FROM_STEP, output)
        ranks = ranks_of(output)
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[victim].pid, signal.SIGSTOP)
        wait_for_end([launchers[1 - victim]], output, seconds=60 * TIMEOUT_MINUTES + SECONDS_TO_LEAVE)
        os.kill(ranks[victim].pid, signal.SIGCONT)
        codes = wait_for_end(launchers, output, seconds=SECONDS_TO_LEAVE)
        assert 0 not in codes
        assert not [rank for rank, process in ranks.items() if process.is_alive()]
    found = [line for path in output.glob("debug/logs/rank-*.log") for line in path.read_text().splitlines()]
    naming = [line for line in found if f"rank {victim} on node{victim + 9}" in line and "stopped responding" in line]
    assert len(naming) == 1, said(output)
