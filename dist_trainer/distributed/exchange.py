"""How a group of ranks shares out a sum: each rank gets its shard of all ranks' tensors, and later the sums of all shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dist_trainer.distributed.collectives import gather_objects
from dist_trainer.distributed.context import COLLECTIVE_TIMEOUT, DistributedContext

ALIGNMENT = 16
"""Elements: shards begin at multiples of it, as vectorised kernels round the last elements of a ragged piece differently."""


def shard_size(elements: int, ranks: int) -> int:
    """Elements of a rank's shard of a tensor of `elements`; the last shards may be shorter or empty."""
    return -(-elements // (ranks * ALIGNMENT)) * ALIGNMENT


class Exchange(Protocol):
    """A group of ranks that exchange shards. Each call is a collective."""

    group: dist.ProcessGroup
    """The ranks."""

    def scatter(self, tensors: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
        """This rank's shard of every rank's `tensors`, by rank; all are flat, of one size and format.

        `counts`: how many tensors each rank has. The shards may be shared memory: read them only, and before `gather`.
        """
        ...

    def gather(self, shard: Tensor, out: Tensor) -> None:
        """Write every rank's `shard`, in the order of ranks, to the flat tensor `out`."""
        ...


class AllToAll:
    """By collectives of torch.distributed, on any device and any network: the volume of a ring's all-reduce."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._ranks = dist.get_world_size(group)

    def scatter(self, tensors: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
        """See Exchange."""
        size = shard_size(len(tensors[0]), self._ranks)
        sent = tensors[0].new_zeros((self._ranks, len(tensors), size))
        for index, tensor in enumerate(tensors):
            for rank, part in enumerate(tensor.split(size)):
                sent[rank, index, : len(part)] = part
        received = tensors[0].new_empty(sum(counts) * size)
        sizes_sent, sizes_received = [len(tensors) * size] * self._ranks, [count * size for count in counts]
        dist.all_to_all_single(received, sent.view(-1), sizes_received, sizes_sent, group=self.group)
        return [list(part.split(size)) for part in received.split(sizes_received)]

    def gather(self, shard: Tensor, out: Tensor) -> None:
        """See Exchange."""
        gathered = shard.new_empty(self._ranks, len(shard))
        dist.all_gather(list(gathered), shard.contiguous(), group=self.group)
        out.copy_(gathered.view(-1)[: len(out)])


class SharedMemory:
    """Through memory that the ranks of one machine share: a copy in and a copy out instead of sockets.

    Anonymous memory (memfd_create), so that no file is left behind whatever happens to a rank.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """A collective; raises OSError on all ranks if one cannot open the others' memory."""
        self.group = group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._memory: list[Tensor] = []
        self._share(ALIGNMENT, torch.float32)

    def scatter(self, tensors: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
        """See Exchange."""
        elements = len(tensors[0])
        size = shard_size(elements, self._ranks)
        whole = size * self._ranks
        if self._memory[0].dtype != tensors[0].dtype or len(self._memory[0]) < max(counts) * whole + size:
            self._share(max(counts) * whole + size, tensors[0].dtype)
        for index, tensor in enumerate(tensors):
            self._memory[self._rank][index * whole : index * whole + elements] = tensor
        self._wait_for_all()
        begin = self._rank * size
        return [
            [memory[index * whole + begin : index * whole + begin + size] for index in range(count)]
            for memory, count in zip(self._memory, counts, strict=True)
        ]

    def gather(self, shard: Tensor, out: Tensor) -> None:
        """See Exchange."""
        size = len(shard)
        self._memory[self._rank][-size:] = shard
        self._wait_for_all()
        for memory, part in zip(self._memory, out.split(size), strict=False):
            part.copy_(memory[-size:][: len(part)])

    def _wait_for_all(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self.group)

    def _share(self, elements: int, dtype: torch.dtype) -> None:
        """Replace every rank's memory by one of `elements`. A collective."""
        descriptor = os.memfd_create("gradients")
        os.ftruncate(descriptor, elements * dtype.itemsize)
        names: list[str] = [""] * self._ranks
        dist.all_gather_object(names, f"/proc/{os.getpid()}/fd/{descriptor}", group=self.group)
        error: OSError | RuntimeError | None = None
        try:
            self._memory = [torch.from_file(name, shared=True, size=elements, dtype=dtype) for name in names]
        except (OSError, RuntimeError) as raised:
            error = raised
        errors: list[OSError | RuntimeError | None] = [None] * self._ranks
        dist.all_gather_object(errors, error, group=self.group)
        os.close(descriptor)
        for shared in errors:
            if shared is not None:
                raise OSError(f"the ranks of this machine cannot share memory: {shared}")


def build_exchanges(world: DistributedContext) -> list[Exchange]:
    """Groups of ranks through which a sum over all ranks passes, from those of a machine to machines. For all ranks."""
    exchanges: list[Exchange] = []
    for group, is_one_machine in _groups(world):
        is_in_host_memory = is_one_machine and world.device.type == "cpu"
        exchanges.append(_shared_memory_if_possible(group) if is_in_host_memory else AllToAll(group))
    return exchanges


def _shared_memory_if_possible(group: dist.ProcessGroup) -> Exchange:
    try:
        return SharedMemory(group)
    except OSError:  # containers of their own
        return AllToAll(group)


def _groups(world: DistributedContext) -> list[tuple[dist.ProcessGroup, bool]]:
    """This rank's group on its machine and its group across machines, and whether each is of one machine."""
    everyone = dist.group.WORLD
    assert everyone is not None, "several ranks have a process group"
    local = world.local_world_size
    places = gather_objects((world.local_rank, local), world)
    is_regular = all(place == (rank % local, local) for rank, place in enumerate(places))
    if local == world.world_size or local == 1 or not is_regular:
        return [(everyone, local == world.world_size)]
    machines = [list(range(first, first + local)) for first in range(0, world.world_size, local)]
    across = [list(range(first, world.world_size, local)) for first in range(local)]
    return [(_group_of(world, machines), True), (_group_of(world, across), False)]


def _group_of(world: DistributedContext, partition: list[list[int]]) -> dist.ProcessGroup:
    """This rank's group, of the ranks in `partition`; all ranks make all groups."""
    groups = [(ranks, dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)) for ranks in partition]
    [group] = [group for ranks, group in groups if world.rank in ranks]
    assert isinstance(group, dist.ProcessGroup), "torch returns a number to ranks outside of a group"
    return group
