"""What started this process, whether it still lives, and whether it starts it once more after a crash."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping
from contextlib import suppress

from dist_trainer.distributed.launch_env import place_or_none, started_by_srun
from dist_trainer.errors import PeerLostError
from dist_trainer.storage.processes import ProcessId, command_of

LAUNCHER_PID = "DIST_TRAINER_LAUNCHER_PID"
"""The variable that names torchrun's process: set by the launch files, which become it, else by its ranks themselves."""
MOST_OPEN_FILES = 65_536
"""More than any number of ranks needs, and few enough for programs that close all descriptors one by one."""


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or srun as a launcher of ranks, started this process, and should not be outlived."""
    return "TORCHELASTIC_RUN_ID" in environment or started_by_srun(environment)


def begin_as_rank() -> None:
    """What a launched rank does first of all, before it imports anything heavy; once more changes nothing.

    Raises PeerLostError if the launcher has died already.
    """
    if not is_launched():
        return
    os.environ.setdefault(LAUNCHER_PID, str(living_launcher()))
    place = place_or_none()
    if place is not None and place.world_size > 1:
        allow_many_open_files()


def allow_many_open_files() -> None:
    """Raise this process's limit of open files, often 1,024, as far as the system allows: rank 0 has three connections or
    more with each of the other ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MOST_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def living_launcher(environment: Mapping[str, str] = os.environ) -> int:
    """The process that started this one and is to be watched.

    Raises PeerLostError where it has died, which a process cannot simply see: it has another parent then, and does not know
    its first one. That is so where the parent is not the launcher's process, which has ended; where nothing is known of
    that, process 1 is taken for a foster parent, unless it is a Python: in a container torchrun may be the first process.
    """
    parent = os.getppid()
    named = environment.get(LAUNCHER_PID, "")
    words = command_of(parent)
    if named.isdigit():
        # PYTHON may be a wrapper that stays, or one that enters a container with process ids of its own.
        lives = parent == int(named) or "torch.distributed.run" in words or ProcessId.of(int(named)).is_alive()
    else:
        lives = parent != 1 or started_by_srun(environment) or "python" in os.path.basename(words[0] if words else "")
    if not lives:
        raise PeerLostError(f"the launcher{f' (pid {named})' if named else ''} is gone; this rank does not train without it")
    return parent


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """Names the torchrun that this process is a rank of, the same over its restarts; None without one."""
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    return None if run_id is None else f"torchrun {run_id}, pid {os.getppid()} on {socket.gethostname()}"


def is_started_again(before: str | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher named `before` has restarted its ranks, and this is one of them."""
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return restarts > 0 and before is not None and before == launcher(environment)
