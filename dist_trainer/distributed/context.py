"""`DistributedContext`: which rank this process is, on which device, and the process groups it shares with the others."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_trainer.config.schema import DistributedConfig
from dist_trainer.distributed.addresses import interface_of
from dist_trainer.distributed.heartbeat import Heartbeat
from dist_trainer.distributed.launch_env import (
    RankInfo,
    begin_as_rank,
    is_launched,
    living_launcher,
    may_see_one_gpu_each,
    rank_info,
)
from dist_trainer.distributed.machine import usable_cpus
from dist_trainer.distributed.rendezvous import rendezvous
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import ConfigError, DistTrainerError, OutOfMemoryError, PeerLostError, counted

CPU_GROUP_TIMEOUT = timedelta(days=7)
"""Timeout of the CPU group: a rank may wait in it for hours while others prepare a dataset."""
COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""Minimum timeout of collectives on the device. The heartbeat notices sooner, and knows which waits are legitimate."""
MOST_COMPILE_THREADS = 32
"""torch compiles with one process per core, up to this many, and ignores CPU quotas."""
ERROR_PATIENCE_SECONDS = 20.0
FIRST_POLL_SECONDS, POLL_SECONDS = 0.001, 0.02
"""Time between checks whether a collective is complete, at first and later: most complete at once, some take hours."""


@dataclass(frozen=True)
class DistributedContext(RankInfo):
    """Which rank this process is, on which device, and its connections with the other ranks."""

    device: torch.device = field(default=torch.device("cpu"))
    """The device that this rank computes on."""
    cpu_group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    """gloo group for small values in host memory; None for a single process."""
    stop_request: StopRequest = field(default_factory=StopRequest, repr=False, compare=False)
    """Whether a signal asked this rank to stop."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat, repr=False, compare=False)
    """Marks the progress of this rank and watches the others."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    @staticmethod
    def single(device: str | torch.device = "cpu") -> DistributedContext:
        """A single process, without process groups, on `device`."""
        return DistributedContext(device=torch.device(device))


@contextmanager
def init_distributed(
    config: DistributedConfig,
    *,
    stop_request: StopRequest | None = None,
    on_fatal: Callable[[str], None] | None = None,
) -> Generator[DistributedContext]:
    """Join the ranks that torchrun or srun started, and leave them cleanly; a single process if there is no launcher.

    `stop_request`: the command's. `on_fatal` is called, with a sentence, on one of the remaining ranks before it exits because
    the launcher or another rank is lost. Raises ConfigError if the launcher's variables contradict each other, if there are
    more ranks than GPUs, or if the machine does not support the backend; PeerLostError if the launcher or another rank is gone;
    StoppedError if a signal arrived before all ranks had joined.
    """
    begin_as_rank()
    info = rank_info()
    keep_threads_within_quota()
    device = _device_of(info, config.backend)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuBLAS and torch read it once, at the first matrix product: without it, deterministic kernels are refused then.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    heartbeat = Heartbeat(rank=info.rank, timeout_minutes=config.hang_timeout_minutes, on_fatal=on_fatal)
    stop_request = StopRequest() if stop_request is None else stop_request  # not `or`: without a signal it is false
    if is_launched():
        heartbeat.watch_launcher(living_launcher(), stop_request.note_lost_launcher)
    try:
        groups = nullcontext() if info.world_size == 1 else _process_groups(info, device, heartbeat, stop_request)
        with groups as cpu_group:
            yield DistributedContext(
                **asdict(info), device=device, cpu_group=cpu_group, stop_request=stop_request, heartbeat=heartbeat
            )
    finally:
        heartbeat.stop()


def keep_threads_within_quota() -> None:
    """Compute and compile with no more threads than a container's CPU quota keeps busy.

    OMP_NUM_THREADS and TORCHINDUCTOR_COMPILE_THREADS take precedence.
    """
    cpus = usable_cpus()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cpus:
        torch.set_num_threads(cpus)
    if cpus < min(MOST_COMPILE_THREADS, os.cpu_count() or 1):
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(cpus))


def _device_of(info: RankInfo, backend: str) -> torch.device:
    if backend == "gloo" or (backend == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    available = torch.cuda.device_count()
    if available == 0:
        raise ConfigError("distributed.backend: nccl needs a CUDA GPU, and there is none here; use auto or gloo")
    one_gpu_each = available == 1 and info.local_world_size > 1 and may_see_one_gpu_each()
    index = 0 if one_gpu_each else info.local_rank
    if index >= available:
        raise ConfigError(
            f"{info.local_world_size} ranks on this machine, but it has {counted(available, 'GPU')}: start at most "
            f"{available} ranks (--nproc_per_node={available}), or train on CPU with --distributed.backend gloo"
        )
    return torch.device("cuda", index)


@contextmanager
def _process_groups(
    info: RankInfo, device: torch.device, heartbeat: Heartbeat, stop_request: StopRequest
) -> Generator[dist.ProcessGroup]:
    """The CPU group, in addition to torch's default one; all ranks leave them together."""
    store, address = rendezvous(info, heartbeat, stop_request)
    _choose_network_interface(info, address)
    with _lost_peers_named(heartbeat):
        cpu_group = _initialise_process_groups(store, info, device, heartbeat.timeout_minutes)
        try:
            yield cpu_group
        except (PeerLostError, OutOfMemoryError):
            raise  # at once: the others may be waiting for this rank elsewhere
        except DistTrainerError:
            # Usually all ranks raise the same error, but a rank that failed in another way never gets here.
            _leave(cpu_group, heartbeat, patience_seconds=ERROR_PATIENCE_SECONDS)
            raise
    _leave(cpu_group, heartbeat)


@contextmanager
def _lost_peers_named(heartbeat: Heartbeat) -> Generator[None]:
    """Turn an error caused by a lost peer into a PeerLostError that names it."""
    try:
        yield
    except DistTrainerError:
        raise
    except Exception as error:
        if lost := heartbeat.lost_peers():
            raise PeerLostError(lost) from error
        raise


def _choose_network_interface(info: RankInfo, address: str | None) -> None:
    """Set gloo's network interface to the one that reaches the other machines, unless the user has set one.

    By default gloo takes the address that this machine's host name resolves to: 127.0.1.1, or none at all, on many machines.
    """
    is_alone = info.world_size == info.local_world_size
    interface = "lo" if is_alone and sys.platform == "linux" else interface_of(address or "")
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _initialise_process_groups(
    store: dist.Store, info: RankInfo, device: torch.device, timeout_minutes: float | None
) -> dist.ProcessGroup:
    timeout = max(COLLECTIVE_TIMEOUT, timedelta(minutes=2 * (timeout_minutes or 0)))
    store.set_timeout(timeout)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=info.rank,
        world_size=info.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    cpu_group = dist.new_group(backend="gloo", timeout=CPU_GROUP_TIMEOUT)
    assert isinstance(cpu_group, dist.ProcessGroup), "every rank is a member of the group of all ranks"
    return cpu_group


def _leave(cpu_group: dist.ProcessGroup, heartbeat: Heartbeat, *, patience_seconds: float = math.inf) -> None:
    """Wait for all ranks before the groups are destroyed: without this barrier every second gloo run hung at its exit."""
    heartbeat.begin_shutdown()
    if is_done_within(patience_seconds, dist.all_reduce(torch.zeros(1), group=cpu_group, async_op=True)):
        heartbeat.stop()
        dist.destroy_process_group()


def is_done_within(patience_seconds: float, work: dist.Work) -> bool:
    """Whether the collective `work` completes in time; signal handlers run meanwhile."""
    end = time.monotonic() + patience_seconds
    pause = FIRST_POLL_SECONDS
    while not work.is_completed():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)
    work.wait()
    return True
