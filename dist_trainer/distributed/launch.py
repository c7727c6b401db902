"""What started this process, and whether it starts it once more after a crash."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from dist_trainer.place import started_by_srun


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or srun as a launcher of ranks, started this process, and should not be outlived."""
    return "TORCHELASTIC_RUN_ID" in environment or started_by_srun(environment)


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """Names the torchrun that this process is a rank of, the same over its restarts; None without one."""
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    return None if run_id is None else f"torchrun {run_id}, pid {os.getppid()} on {socket.gethostname()}"


def is_started_again(before: str | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher named `before` has restarted its ranks, and this is one of them."""
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return restarts > 0 and before is not None and before == launcher(environment)
