"""`World`: which rank this process is, on which device, and the process groups it shares with the others."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_trainer.config.schema import DistributedConfig
from dist_trainer.distributed.heartbeat import Heartbeat
from dist_trainer.distributed.launch import is_launched
from dist_trainer.distributed.preemption import StopRequest
from dist_trainer.distributed.processes import ProcessId
from dist_trainer.errors import ConfigError, DistTrainerError, OutOfMemoryError, PeerLostError
from dist_trainer.place import Place, place_of_this_process

CONTROL_TIMEOUT = timedelta(days=7)
"""Patience of the control group: others may prepare a data set for hours while a rank waits in it."""
COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""Patience of collectives on the device, at least; the heartbeat notices sooner, and knows what is worth waiting for."""
ERROR_PATIENCE_SECONDS = 20.0
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class World(Place):
    """This process among its peers, what it computes on, and how it hears of them."""

    device: torch.device = field(default=torch.device("cpu"))
    """What this rank computes on."""
    control: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    """Group for small facts in host memory, by gloo; None for a single process."""
    stop_request: StopRequest = field(default_factory=StopRequest, repr=False, compare=False)
    """Whether a signal asked this rank to stop."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat, repr=False, compare=False)
    """This rank's sign of life to the others, and theirs to it."""

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

        Raises ConfigError where the launcher's variables make no sense, the ranks outnumber the machine's GPUs, or the backend
        does not fit the machine.
        """
        place = place_of_this_process()
        device = _device_of(place, config.backend)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        heartbeat = Heartbeat(rank=place.rank, timeout_minutes=config.timeout_minutes)
        if is_launched():
            heartbeat.watch_launcher()
        try:
            if place.world_size == 1:
                yield World(device=device, heartbeat=heartbeat)
            else:
                with _process_groups(place, device, heartbeat) as control:
                    yield World(**asdict(place), device=device, control=control, heartbeat=heartbeat)
        finally:
            heartbeat.stop()


def _device_of(place: Place, backend: str) -> torch.device:
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


@contextmanager
def _process_groups(place: Place, device: torch.device, heartbeat: Heartbeat) -> Iterator[dist.ProcessGroup]:
    """The control group, beside torch's default one; left together with all other ranks."""
    _initialise_process_group(place, device, heartbeat.timeout_minutes)
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    assert isinstance(control, dist.ProcessGroup), "every rank is a member of the group of all ranks"
    _watch_peers(heartbeat, place, control)
    try:
        yield control
    except (PeerLostError, OutOfMemoryError):
        raise  # at once: the others may be waiting for this rank elsewhere
    except DistTrainerError:
        # Shared by all ranks as a rule, but a rank that fails in a way of its own never comes.
        _leave(control, heartbeat, patience_seconds=ERROR_PATIENCE_SECONDS)
        raise
    except Exception as error:
        if lost := heartbeat.lost_peers():
            raise PeerLostError(lost) from error
        raise
    else:
        _leave(control, heartbeat)


def _initialise_process_group(place: Place, device: torch.device, timeout_minutes: float | None) -> None:
    alone_on_this_machine = place.world_size == place.local_world_size
    if alone_on_this_machine and sys.platform == "linux":
        # A host name that /etc/hosts maps to 127.0.1.1 would break gloo; within one machine loopback always works.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size))
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=max(COLLECTIVE_TIMEOUT, timedelta(minutes=2 * (timeout_minutes or 0))),
        device_id=device if device.type == "cuda" else None,
    )


def _watch_peers(heartbeat: Heartbeat, place: Place, control: dist.ProcessGroup) -> None:
    """Tell all ranks of this process and of each other, and where rank 0 keeps what they have to say."""
    address, store, port = os.environ["MASTER_ADDR"], None, 0
    if place.rank == 0:
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=CONTROL_TIMEOUT)
        heartbeat.lay_out(store, place.world_size)
        port = store.port
    everyone = [(ProcessId.of(os.getpid()), port)] * place.world_size
    dist.all_gather_object(everyone, everyone[0], group=control)
    if store is None:
        store = dist.TCPStore(address, everyone[0][1], is_master=False, wait_for_workers=False, timeout=CONTROL_TIMEOUT)
    heartbeat.watch_peers([process for process, _ in everyone], store)


def _leave(control: dist.ProcessGroup, heartbeat: Heartbeat, *, patience_seconds: float = math.inf) -> None:
    """Wait for all ranks before the groups go: without this barrier every second gloo run hung at its exit."""
    heartbeat.peers_may_leave()
    if is_done_within(patience_seconds, dist.all_reduce(torch.zeros(1), group=control, async_op=True)):
        heartbeat.stop()
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
