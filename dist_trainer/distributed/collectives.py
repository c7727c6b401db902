"""What ranks tell one another. Each function is the identity for a single process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_trainer.distributed.context import DistributedContext, is_done_within
from dist_trainer.errors import DistTrainerError, StoppedError

T = TypeVar("T")


def all_reduce_sum(tensor: Tensor, world: DistributedContext) -> Tensor:
    """`tensor` summed over all ranks, in place, on the tensor's own device."""
    if world.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


class PendingSum:
    """A few whole numbers on their way to be summed over all ranks, in host memory, while the device computes."""

    def __init__(self, values: list[int], world: DistributedContext) -> None:
        self._values, self._heartbeat = values, world.heartbeat
        self._sums: Tensor | None = None
        if world.cpu_group is not None:
            self._sums = torch.tensor(values, dtype=torch.int64)
            self._work = dist.all_reduce(self._sums, group=world.cpu_group, async_op=True)

    def wait(self) -> list[int]:
        """The sums, once every rank has given its values."""
        if self._sums is None:
            return self._values
        with self._heartbeat.waiting():
            self._work.wait()
        return self._sums.tolist()


def broadcast_object(value: T, world: DistributedContext) -> T:
    """Rank 0's `value` on every rank."""
    if world.cpu_group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=world.cpu_group)
    return values[0]


def gather_objects(value: T, world: DistributedContext) -> list[T]:
    """Every rank's `value`, by rank, on every rank."""
    if world.cpu_group is None:
        return [value]
    values: list[T] = [value] * world.world_size
    dist.all_gather_object(values, value, group=world.cpu_group)
    return values


def barrier(world: DistributedContext) -> None:
    """Wait, for hours if need be, until every rank is here; signal handlers run meanwhile."""
    if world.cpu_group is None:
        return
    with world.heartbeat.waiting():
        is_done_within(math.inf, dist.all_reduce(torch.zeros(1), group=world.cpu_group, async_op=True))


def run_and_share_errors(world: DistributedContext, act: Callable[[], T], *, acts: bool = True) -> T | None:
    """Run `act` on the ranks where `acts` holds; an error that one of them meets is raised on all of them.

    The result is None on the others. A stop signal breaks `act` off, and ends in a StoppedError on all ranks. Only
    DistTrainerErrors are shared; anything else is a crash of its rank.
    """
    result: T | None = None
    error: DistTrainerError | None = None
    if acts:
        try:
            with world.stop_request.interruptible():
                result = act()
        except DistTrainerError as raised:
            error = raised
    barrier(world)
    if error is None and world.stop_request and world.cpu_group is not None:
        error = StoppedError(world.stop_request.signal_number)
    for shared in gather_objects(error, world):
        if shared is not None:
            raise shared
    return result


def run_on_rank0(world: DistributedContext, act: Callable[[], T]) -> T:
    """Run `act` on rank 0 and give its result, or its error, to every rank."""
    return broadcast_object(run_and_share_errors(world, act, acts=world.is_main), world)  # type: ignore[return-value]


def local_rank0_first(world: DistributedContext, prepare: Callable[[], T]) -> T:
    """Run `prepare` on one rank of each machine, then on the others, which find what it left in a cache.

    An error on any rank is raised on all of them.
    """
    if world.cpu_group is None:
        return run_and_share_errors(world, prepare)  # type: ignore[return-value]
    leads = world.local_rank == 0
    first = run_and_share_errors(world, prepare, acts=leads)
    later = run_and_share_errors(world, prepare, acts=not leads)
    return first if leads else later  # type: ignore[return-value]
