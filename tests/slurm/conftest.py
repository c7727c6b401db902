"""One SLURM cluster for all tests of the session. It is taken down in any case, also when pytest is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  three seconds in each forked rank otherwise
import transformers  # noqa: F401

from dist_trainer.run.configure import load_config
from tests.distributed import small_runs
from tests.end_to_end.commands import environment
from tests.slurm import hosts, jobs

FOR_HOSTS = ("ip", "unshare", "nsenter")
FOR_A_CLUSTER = ("slurmctld", "slurmd", "sbatch", "munged", "flock")
NAMESPACES = "unshare --net --uts --ipc --mount --pid --fork --mount-proc ip link add type veth"


def why_not(*programs: str) -> str | None:
    """A reason not to try."""
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge iproute2)"
    if subprocess.run(NAMESPACES.split(), env={"PATH": path}, capture_output=True).returncode:
        return "this machine allows no network namespaces"
    return None


@contextmanager
def taken_down(script: Path, variable: str) -> Generator[Path]:
    """A folder for the state of `script`, which is called with `down` at the end."""
    # Not below pytest's own folder: the path must be short.
    state = Path(tempfile.mkdtemp(prefix="slurm-"))
    settings = environment(**{variable: str(state)})
    guard = subprocess.Popen(
        ["bash", "-c", 'tail --pid="$1" --follow /dev/null; "$2" down; rm -rf "$3"', "guard", str(os.getpid()), script, state],
        env=settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield state
    finally:
        subprocess.run([script, "down"], env=settings, check=True, timeout=120)
        shutil.rmtree(state, ignore_errors=True)
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[jobs.Cluster]:
    reason = why_not(*FOR_A_CLUSTER, *FOR_HOSTS)
    if reason is not None:
        pytest.skip(f"no SLURM cluster: {reason}")
    with taken_down(jobs.SCRIPT, "CLUSTER_STATE") as state:
        cluster = jobs.Cluster(state)
        cluster.boot()
        yield cluster


@pytest.fixture
def cluster(running_cluster: jobs.Cluster) -> Iterator[jobs.Cluster]:
    """With all its nodes up, and no job on it before and after."""
    running_cluster.boot()
    yield running_cluster
    running_cluster.clear()


@pytest.fixture
def two_hosts() -> Iterator[hosts.Hosts]:
    """Two machines with a network between them, and nothing else: no names, and NODE_RANK 0 on the one that sorts last."""
    reason = why_not(*FOR_HOSTS)
    if reason is not None:
        pytest.skip(f"no hosts: {reason}")
    with taken_down(hosts.SCRIPT, "NETNS_STATE") as state:
        yield hosts.Hosts(state, ("node9", "node10"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, which nothing disturbed: all others must equal it bit for bit."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = load_config([*jobs.TRAINING, "--tracking.sample_prompt", jobs.SPACES, "--output_dir", str(folder)])
    assert small_runs.run(config, 1) == [0]
    return folder / "debug"
