"""Collectives: how ranks exchange values and errors. Each function is the identity for a single process."""

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


def gather_numbers(values: Tensor, world: DistributedContext) -> list[float]:
    """The elements of every rank's `values` (vectors of one size), in rank order. Waits for the device."""
    values = values.double()
    if world.world_size == 1:
        return values.tolist()
    gathered = values.new_empty(world.world_size, len(values))
    dist.all_gather(list(gathered), values)
    return gathered.flatten().tolist()


def sum_exactly(values: list[float]) -> float:
    """The sum of `values`, rounded once; infinities and NaN propagate as in any sum."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


class PendingSum:
    """The sum over all ranks of a few integers, computed in host memory while the device works."""

    def __init__(self, values: list[int], world: DistributedContext) -> None:
        self._values, self._heartbeat = values, world.heartbeat
        self._sums: Tensor | None = None
        if world.cpu_group is not None:
            self._sums = torch.tensor(values, dtype=torch.int64)
            self._work = dist.all_reduce(self._sums, group=world.cpu_group, async_op=True)

    def wait(self) -> list[int]:
        """The sums, once every rank has contributed."""
        if self._sums is None:
            return self._values
        with self._heartbeat.waiting():
            self._work.wait()
        return self._sums.tolist()


def broadcast_object(value: T, world: DistributedContext, *, source: int = 0) -> T:
    """The `value` of rank `source`, on every rank."""
    if world.cpu_group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=source, group=world.cpu_group)
    return values[0]


def gather_objects(value: T, world: DistributedContext) -> list[T]:
    """Every rank's `value`, in rank order, on every rank."""
    if world.cpu_group is None:
        return [value]
    values: list[T] = [value] * world.world_size
    dist.all_gather_object(values, value, group=world.cpu_group)
    return values


def barrier(world: DistributedContext) -> None:
    """Wait until every rank gets here, for hours if necessary; signal handlers run meanwhile."""
    if world.cpu_group is None:
        return
    with world.heartbeat.waiting():
        is_done_within(math.inf, dist.all_reduce(torch.zeros(1), group=world.cpu_group, async_op=True))


def run_and_share_errors(world: DistributedContext, act: Callable[[], T], *, acts: bool = True) -> T | None:
    """Run `act` on the ranks that pass `acts`; an error on one of them is raised on all ranks.

    Returns the result of `act`, None on the other ranks. A stop signal interrupts `act` and raises StoppedError on all ranks.
    Only DistTrainerErrors are shared; any other error is a crash of its rank.
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
    """Run `act` on rank 0; every rank returns its result or raises its error."""
    return broadcast_object(run_and_share_errors(world, act, acts=world.is_main), world)  # type: ignore[return-value]


def local_rank0_first(world: DistributedContext, prepare: Callable[[], T]) -> T:
    """Run `prepare` on one rank of each machine, then on the others, which can use what the first one has cached.

    An error on one rank is raised on all ranks.
    """
    if world.cpu_group is None:
        return run_and_share_errors(world, prepare)  # type: ignore[return-value]
    is_first = world.local_rank == 0
    first = run_and_share_errors(world, prepare, acts=is_first)
    later = run_and_share_errors(world, prepare, acts=not is_first)
    return first if is_first else later  # type: ignore[return-value]
