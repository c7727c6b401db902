"""`World`: which rank this process is, on which device, and the process groups it shares with the others."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_trainer.config.schema import DistributedConfig
from dist_trainer.distributed.preemption import StopRequest
from dist_trainer.errors import ConfigError, DistTrainerError

CONTROL_TIMEOUT = timedelta(days=7)
"""Patience of the control group: others may prepare a data set for hours while a rank waits in it."""
ERROR_PATIENCE_SECONDS = 20.0
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int = 0
    """0 to world_size - 1."""
    local_rank: int = 0
    """Rank among the processes of this machine."""
    world_size: int = 1
    """Number of ranks."""
    local_world_size: int = 1
    """Number of ranks on this machine."""
    device: torch.device = field(default=torch.device("cpu"))
    """What this rank computes on."""
    control: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    """Group for small facts in host memory, by gloo; None for a single process."""
    stop_request: StopRequest = field(default_factory=StopRequest, repr=False, compare=False)
    """Whether a signal asked this rank to stop."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    @staticmethod
    def single(device: str | torch.device = "cpu") -> World:
        """One process without process group, on `device`."""
        return World(device=torch.device(device))

    @classmethod
    @contextmanager
    def join(cls, config: DistributedConfig) -> Iterator[World]:
        """Join the ranks that torchrun or srun started, and leave them in order; alone where there is no launcher.

        Raises ConfigError where the ranks outnumber the machine's GPUs or the backend does not fit the machine.
        """
        place = _place_of_this_process(os.environ)
        device = _device_of(place, config.backend)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if place.world_size == 1:
            yield World(device=device)
            return
        _initialise_process_group(place, config, device)
        control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        assert isinstance(control, dist.ProcessGroup), "every rank is a member of the group of all ranks"
        try:
            yield World(place.rank, place.local_rank, place.world_size, place.local_world_size, device, control)
        except DistTrainerError:
            # Shared by all ranks as a rule, but a rank that fails in a way of its own never comes.
            _leave(control, patience_seconds=ERROR_PATIENCE_SECONDS)
            raise
        else:
            _leave(control)


@dataclass(frozen=True)
class _Place:
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def _place_of_this_process(environment: Mapping[str, str]) -> _Place:
    """What torchrun's variables say, else what srun's say (with MASTER_ADDR and MASTER_PORT set), else alone."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        world_size = int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", environment["RANK"]))
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        return _Place(int(environment["RANK"]), local_rank, world_size, local_world_size)
    if "SLURM_PROCID" in environment and "MASTER_ADDR" in environment:
        tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
        nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
        local_rank = int(environment.get("SLURM_LOCALID", "0"))
        return _Place(int(environment["SLURM_PROCID"]), local_rank, tasks, -(-tasks // nodes))
    return _Place(0, 0, 1, 1)


def _device_of(place: _Place, backend: str) -> torch.device:
    if backend == "gloo" or (backend == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    available = torch.cuda.device_count()
    if available == 0:
        raise ConfigError("distributed.backend: nccl needs CUDA GPUs and there is none here; use auto or gloo")
    # srun may show each rank just its own GPU, which then is number 0 for each of them.
    one_gpu_each = available == 1 and place.local_world_size > 1 and "SLURM_LOCALID" in os.environ
    index = 0 if one_gpu_each else place.local_rank
    if index >= available:
        raise ConfigError(
            f"{place.local_world_size} ranks on this machine, but it has {available} GPUs: start at most {available} "
            f"ranks (--nproc_per_node={available}), or train on CPU with --distributed.backend gloo"
        )
    return torch.device("cuda", index)


def _initialise_process_group(place: _Place, config: DistributedConfig, device: torch.device) -> None:
    alone_on_this_machine = place.world_size == place.local_world_size
    if alone_on_this_machine and sys.platform == "linux":
        # A host name that /etc/hosts maps to 127.0.1.1 would break gloo; within one machine loopback always works.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size))
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=config.timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )


def _leave(control: dist.ProcessGroup, *, patience_seconds: float = math.inf) -> None:
    """Wait for all ranks before the groups go: without this barrier every second gloo run hung at its exit."""
    if is_done_within(patience_seconds, dist.all_reduce(torch.zeros(1), group=control, async_op=True)):
        dist.destroy_process_group()


def is_done_within(patience_seconds: float, work: dist.Work) -> bool:
    """Whether the collective `work` was completed in time; signal handlers run while it is waited for."""
    end = time.monotonic() + patience_seconds
    while not work.is_completed():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    work.wait()
    return True
