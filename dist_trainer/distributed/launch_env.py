"""Which rank of how many this process is, and what launched it, from the launcher's environment variables."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from dist_trainer.errors import ConfigError, PeerLostError
from dist_trainer.storage.processes import ProcessId, command_of

LAUNCHER_PID = "DIST_TRAINER_LAUNCHER_PID"
"""The variable with the pid of torchrun: set by the launch files, which exec torchrun, otherwise by the ranks themselves."""
PORT = "DIST_TRAINER_PORT"
"""The variable with which launch files choose the ports of rank 0's two stores, this one and the next, for firewalls to open.
Without it the rendezvous is at MASTER_PORT, and the second store gets any free port."""
MOST_OPEN_FILES = 65_536
"""More than any number of ranks needs, but few enough for programs that close all descriptors one by one."""


@dataclass(frozen=True)
class RankInfo:
    """Which rank a process is."""

    rank: int = 0
    """0 to world_size - 1."""
    local_rank: int = 0
    """Rank among the processes of this machine."""
    world_size: int = 1
    """Number of ranks."""
    local_world_size: int = 1
    """Number of ranks on this machine."""


def rank_info(environment: Mapping[str, str] = os.environ) -> RankInfo:
    """From torchrun's variables, else from srun's (if MASTER_ADDR is set), else for a single process.

    RANK without WORLD_SIZE, or the reverse, is ignored: some machines set one for everyone. Raises ConfigError for numbers that
    contradict each other, and for several ranks without a rendezvous address.
    """
    info = _from_variables(environment)
    # The local numbers are not checked against world_size: srun may distribute its tasks unevenly over the nodes.
    if not (0 <= info.rank < info.world_size and info.local_rank >= 0 and info.local_world_size >= 1):
        raise ConfigError(
            f"the launcher's variables contradict each other: rank {info.rank} of {info.world_size}, on this machine "
            f"{info.local_rank} of {info.local_world_size}; start with torchrun, or unset RANK and WORLD_SIZE for one process"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if info.world_size > 1 and missing:
        unset = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
        raise ConfigError(
            f"there are {info.world_size} ranks, but {unset}, so they cannot find each other; start with torchrun, "
            "or unset RANK and WORLD_SIZE for one process"
        )
    if info.world_size > 1 and not 1 <= (port := _number(environment, "MASTER_PORT", 0)) <= 65535:
        raise ConfigError(f"the environment variable MASTER_PORT is {port}, but ports are numbered from 1 to 65535")
    return info


def rank_info_or_none() -> RankInfo | None:
    """rank_info of this process; None if the launcher's variables make no sense, which is reported elsewhere."""
    try:
        return rank_info()
    except ConfigError:
        return None


def _from_variables(environment: Mapping[str, str]) -> RankInfo:
    def number(name: str, default: int) -> int:
        return _number(environment, name, default)

    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = number("RANK", 0), number("WORLD_SIZE", 1)
        return RankInfo(rank, number("LOCAL_RANK", rank), world_size, number("LOCAL_WORLD_SIZE", world_size))
    if _is_started_by_srun(environment):
        tasks = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
        nodes = number("SLURM_STEP_NUM_NODES", number("SLURM_NNODES", 1))
        return RankInfo(number("SLURM_PROCID", 0), number("SLURM_LOCALID", 0), tasks, -(-tasks // max(1, nodes)))
    return RankInfo()


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError as error:
        remedy = "leave it to torchrun or srun to set"
        raise ConfigError(f"the environment variable {name} is {text!r}, not a whole number; {remedy}") from error


def _is_started_by_srun(environment: Mapping[str, str]) -> bool:
    """Whether srun started the ranks themselves, not just a shell or torchrun: only then is MASTER_ADDR set for it."""
    return "SLURM_PROCID" in environment and "MASTER_ADDR" in environment


@dataclass(frozen=True)
class Endpoint:
    """The address of the rendezvous of a launch."""

    address: str
    port: int
    heartbeat_port: int
    """Port of rank 0's second store; 0: any free one."""
    launcher_keeps_store: bool
    """Whether torchrun hosts the store at `port`, as for torch's env://, rather than rank 0."""
    run_id: str
    """Distinguishes runs that use the same port; empty if the launcher gives none."""

    def __str__(self) -> str:
        """`node1:29500`, or `[fd00::1]:29500`."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def rendezvous_endpoint(environment: Mapping[str, str] = os.environ) -> Endpoint:
    """From the variables of the launcher and of the launch files; for several ranks, `rank_info` must have checked them."""
    launcher_keeps_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own_port = environment.get(PORT)
    port = environment["MASTER_PORT"] if launcher_keeps_store or not own_port else own_port
    return Endpoint(
        environment["MASTER_ADDR"],
        int(port),
        int(port) + 1 if PORT in environment else 0,
        launcher_keeps_store,
        environment.get("TORCHELASTIC_RUN_ID", ""),
    )


def may_see_one_gpu_each(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether srun started the tasks: it may show each task only its own GPU, which then is number 0 for each."""
    return "SLURM_LOCALID" in environment


# ---------------------------------------------------------------------------------------------- the launcher


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or srun as a launcher of ranks, started this process, which then must not outlive it."""
    return "TORCHELASTIC_RUN_ID" in environment or _is_started_by_srun(environment)


def begin_as_rank() -> None:
    """The first thing a launched rank does, before any heavy import. A second call changes nothing.

    Records the launcher's pid, and raises this process's limit on open files, often 1,024, as far as the system allows: rank 0
    has three or more connections to each of the other ranks. Raises PeerLostError if the launcher has already died.
    """
    if not is_launched():
        return
    os.environ.setdefault(LAUNCHER_PID, str(living_launcher()))
    info = rank_info_or_none()
    if info is None or info.world_size == 1:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MOST_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def living_launcher(environment: Mapping[str, str] = os.environ) -> int:
    """The pid of the process that started this one and must be watched.

    Raises PeerLostError if it has died. A process cannot see that directly: it then has another parent, and its first one is
    unknown. The launcher has died if the parent is not the recorded launcher and that process has ended. If none was recorded,
    process 1 counts as an adoptive parent, unless it is Python: in a container torchrun may be process 1.
    """
    parent = os.getppid()
    noted = environment.get(LAUNCHER_PID, "")
    command = command_of(parent)
    if noted.isdigit():
        # PYTHON may be a wrapper that keeps running, or one that enters a container with separate process ids.
        alive = parent == int(noted) or "torch.distributed.run" in command or ProcessId.of(int(noted)).is_alive()
    else:
        alive = parent != 1 or _is_started_by_srun(environment) or "python" in os.path.basename(command[0] if command else "")
    if not alive:
        raise PeerLostError(f"the launcher{f' (pid {noted})' if noted else ''} is gone; its ranks exit too")
    return parent


def launcher_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Identifies the torchrun that launched this process, the same across its restarts; None without one."""
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    return None if run_id is None else f"torchrun {run_id}, pid {os.getppid()} on {socket.gethostname()}"


def is_restarted_by(launcher: str | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher with this id has restarted this rank."""
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return restarts > 0 and launcher is not None and launcher == launcher_id(environment)
