"""Which rank of how many this process is, by the launcher's environment variables; decided here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dist_trainer.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """A process among its peers."""

    rank: int = 0
    """0 to world_size - 1."""
    local_rank: int = 0
    """Rank among the processes of this machine."""
    world_size: int = 1
    """Number of ranks."""
    local_world_size: int = 1
    """Number of ranks on this machine."""


def place_of_this_process(environment: Mapping[str, str] = os.environ) -> Place:
    """What torchrun's variables say, else what srun's say (with MASTER_ADDR and MASTER_PORT set), else alone.

    RANK or WORLD_SIZE without the other, which some machines set for everyone, means nothing. Raises ConfigError for
    numbers that make no sense, and for several ranks without a place to meet at.
    """
    place = _by_launcher(environment)
    # Nothing is asked of the numbers on this machine together: srun may spread its tasks unevenly over the nodes.
    if not (0 <= place.rank < place.world_size and place.local_rank >= 0 and place.local_world_size >= 1):
        raise ConfigError(
            f"the launcher's variables contradict one another: rank {place.rank} of {place.world_size}, on this machine "
            f"{place.local_rank} of {place.local_world_size}; start with torchrun, or unset RANK and WORLD_SIZE for one process"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if place.world_size > 1 and missing:
        unset = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
        raise ConfigError(
            f"there are {place.world_size} ranks, but {unset}, the place where they meet; start with torchrun, "
            "or unset RANK and WORLD_SIZE for one process"
        )
    if place.world_size > 1 and not 1 <= (port := _number(environment, "MASTER_PORT", 0)) <= 65535:
        raise ConfigError(f"the environment variable MASTER_PORT is {port}, but ports are numbered from 1 to 65535")
    return place


def place_or_none() -> Place | None:
    """The place of this process; None where the launcher's variables make no sense, which is said elsewhere."""
    try:
        return place_of_this_process()
    except ConfigError:
        return None


def started_by_srun(environment: Mapping[str, str]) -> bool:
    """Whether srun started the ranks, and not just a shell or torchrun: then MASTER_ADDR was set for it."""
    return "SLURM_PROCID" in environment and "MASTER_ADDR" in environment


def _number(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    text = environment.get(name)
    if text is None:
        return otherwise
    try:
        return int(text)
    except ValueError as error:
        remedy = "leave it to torchrun or srun to set"
        raise ConfigError(f"the environment variable {name} is {text!r}, not a whole number; {remedy}") from error


def _by_launcher(environment: Mapping[str, str]) -> Place:
    def number(name: str, otherwise: int) -> int:
        return _number(environment, name, otherwise)

    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = number("RANK", 0), number("WORLD_SIZE", 1)
        return Place(rank, number("LOCAL_RANK", rank), world_size, number("LOCAL_WORLD_SIZE", world_size))
    if started_by_srun(environment):
        tasks = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
        nodes = number("SLURM_STEP_NUM_NODES", number("SLURM_NNODES", 1))
        return Place(number("SLURM_PROCID", 0), number("SLURM_LOCALID", 0), tasks, -(-tasks // max(1, nodes)))
    return Place()
