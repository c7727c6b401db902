"""One SLURM cluster for all tests of the session. It is taken down in any case, also when pytest is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  three seconds in each forked rank otherwise
import transformers  # noqa: F401

from tests.end_to_end.commands import environment
from tests.slurm.jobs import SCRIPT, Cluster

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "flock")
NAMESPACES = "unshare --net --uts --ipc --mount --pid --fork --mount-proc ip link add type veth"


def why_there_is_no_cluster() -> str | None:
    """A reason not to try."""
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge iproute2)"
    if subprocess.run(NAMESPACES.split(), env={"PATH": path}, capture_output=True).returncode:
        return "this machine allows no network namespaces"
    return None


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    reason = why_there_is_no_cluster()
    if reason is not None:
        pytest.skip(f"no SLURM cluster: {reason}")
    # Not below pytest's own folder: the path must be short.
    state = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(state)
    guard = subprocess.Popen(
        ["bash", "-c", 'tail --pid="$1" --follow /dev/null; "$2" down', "guard", str(os.getpid()), SCRIPT],
        env=environment(CLUSTER_STATE=str(state)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        cluster.boot()
        yield cluster
    finally:
        cluster.control("down")
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """With all its nodes up, and no job on it before and after."""
    running_cluster.boot()
    yield running_cluster
    running_cluster.clear()
