"""How a group of ranks shares out a sum: each rank gets its shard of all ranks' tensors, and later the sums of all shards."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dist_trainer.distributed.collectives import gather_objects
from dist_trainer.distributed.context import COLLECTIVE_TIMEOUT, DistributedContext

ALIGNMENT = 16
"""Shards begin at multiples of this many elements: vectorised kernels may round the last elements of a piece differently."""


def shard_size(elements: int, ranks: int) -> int:
    """Elements of each rank's shard of a tensor of `elements`. The last shards reach beyond its end."""
    return -(-elements // (ranks * ALIGNMENT)) * ALIGNMENT


class Exchange(Protocol):
    """Exchanges shards within a group of ranks. Each call is a collective."""

    group: dist.ProcessGroup
    """The ranks."""

    def scatter(self, tensors: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
        """This rank's shard of every rank's `tensors`, by rank. All are flat, of one size and format.

        `counts`: how many tensors each rank has. A shard may be another rank's memory: do not write to it, and do not read it
        after `gather`. Elements beyond the end of the tensors are arbitrary.
        """
        ...

    def gather(self, shard: Tensor, out: Tensor) -> None:
        """Write all ranks' `shard`, in the order of ranks, to the flat tensor `out`."""
        ...


class AllToAll:
    """By collectives of torch.distributed, on any device and network. The volume is that of a ring's all-reduce."""

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
        dist.all_to_all_single(received, sent.flatten(), sizes_received, sizes_sent, group=self.group)
        return [list(part.split(size)) for part in received.split(sizes_received)]

    def gather(self, shard: Tensor, out: Tensor) -> None:
        """See Exchange."""
        gathered = shard.new_empty(self._ranks, len(shard))
        dist.all_gather(list(gathered), shard.contiguous(), group=self.group)
        out.copy_(gathered.flatten()[: len(out)])


class SharedMemory:
    """Through memory that the processes of one machine share: twice as fast as gloo's all-reduce (docs/decisions/sums.md).

    The memory is anonymous (memfd_create): it is freed with the processes, however they end.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """A collective; raises OSError on all ranks if one of them cannot open the others' memory."""
        self.group = group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._share(bytes_each=1)

    def scatter(self, tensors: list[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
        """See Exchange."""
        size = shard_size(len(tensors[0]), self._ranks)
        padded, dtype = size * self._ranks, tensors[0].dtype
        needed = (max(counts) * padded + size) * dtype.itemsize
        if len(self._bytes[0]) < needed:
            self._share(bytes_each=needed)
        memories = [memory[:needed].view(dtype) for memory in self._bytes]
        for index, tensor in enumerate(tensors):
            memories[self._rank][index * padded :][: len(tensor)] = tensor
        self._wait_for_all()
        mine = self._rank * size
        return [
            [memory[index * padded + mine :][:size] for index in range(count)]
            for memory, count in zip(memories, counts, strict=True)
        ]

    def gather(self, shard: Tensor, out: Tensor) -> None:
        """See Exchange."""
        # After the tensors, which other ranks may still be reading.
        places = [memory[-shard.nbytes :].view(shard.dtype) for memory in self._bytes]
        places[self._rank].copy_(shard)
        self._wait_for_all()
        for place, part in zip(places, out.split(len(shard)), strict=False):
            part.copy_(place[: len(part)])

    def _wait_for_all(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self.group)

    def _share(self, *, bytes_each: int) -> None:
        """Replace every rank's memory. A collective."""
        bytes_each = -(-bytes_each // 64) * 64  # so that its end is aligned for every format
        mark, path, error, descriptor = secrets.token_bytes(16), "", "", -1
        try:
            descriptor = os.memfd_create("dist_trainer")
            os.ftruncate(descriptor, bytes_each)
            os.pwrite(descriptor, mark, 0)
            path = f"/proc/{os.getpid()}/fd/{descriptor}"
        except OSError as raised:
            error = str(raised)
        offers = self._gathered((path, mark, error))
        try:
            if not any(error for _, _, error in offers):
                self._bytes = [torch.from_file(offer[0], shared=True, size=bytes_each, dtype=torch.uint8) for offer in offers]
                # In containers with process ids of their own, the path of another rank may lead to other memory.
                marks = [memory[: len(mark)].numpy().tobytes() for memory in self._bytes]
                error = "" if marks == [offer[1] for offer in offers] else "another rank's memory is not under its path"
        except RuntimeError as raised:
            error = str(raised)
        errors = self._gathered(error)
        if descriptor >= 0:
            os.close(descriptor)
        if any(errors):
            raise OSError(next(filter(None, errors)))

    def _gathered(self, value: Any) -> list[Any]:
        values = [value] * self._ranks
        dist.all_gather_object(values, value, group=self.group)
        return values


def build_exchanges(world: DistributedContext) -> list[Exchange]:
    """The groups of ranks through which a sum over all ranks passes: those of this machine first. For all ranks."""
    exchanges: list[Exchange] = []
    for group, is_of_one_machine in _groups(world):
        in_host_memory = is_of_one_machine and world.device.type == "cpu"
        exchanges.append(_shared_memory_if_possible(group) if in_host_memory else AllToAll(group))
    return exchanges


def _shared_memory_if_possible(group: dist.ProcessGroup) -> Exchange:
    if not hasattr(os, "memfd_create"):  # Linux has it
        return AllToAll(group)
    try:
        return SharedMemory(group)
    except OSError:  # each rank is in a container of its own
        return AllToAll(group)


def _groups(world: DistributedContext) -> list[tuple[dist.ProcessGroup, bool]]:
    """The ranks of this machine and those with this one's place on other machines, and whether a group is of one machine.

    All ranks together, if there is one machine, one rank on each, or not the same number on each.
    """
    local, places = world.local_world_size, gather_objects((world.local_rank, world.local_world_size), world)
    is_regular = all(place == (rank % local, local) for rank, place in enumerate(places))
    if local in (1, world.world_size) or not is_regular:
        assert dist.group.WORLD is not None, "several ranks have a process group"
        return [(dist.group.WORLD, local == world.world_size)]
    machines = [list(range(first, first + local)) for first in range(0, world.world_size, local)]
    across = [list(range(first, world.world_size, local)) for first in range(local)]
    return [(_group_of(world, machines), True), (_group_of(world, across), False)]


def _group_of(world: DistributedContext, partition: list[list[int]]) -> dist.ProcessGroup:
    """The group of `partition` that this rank is in. All ranks must make all groups."""
    groups = [(ranks, dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)) for ranks in partition]
    [group] = [group for ranks, group in groups if world.rank in ranks]
    assert isinstance(group, dist.ProcessGroup), "torch returns a number to ranks outside a group"
    return group
