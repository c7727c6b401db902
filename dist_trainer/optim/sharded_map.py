"""Work on many tensors, each done by one rank for all."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """How many share the work: those of torch's process group, if there is one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sharded_map(tensors: list[Tensor], work: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """What `work` makes of `tensors`, [n, *shape], on every rank; all ranks must ask for the same.

    `work` gets a rank's share of them, and gives their results, stacked, all of one shape. These have the same bits on all
    ranks, also where one rank's device would round otherwise than another's.
    """
    ranks = num_ranks()
    if ranks == 1:
        return work(tensors)
    count = -(-len(tensors) // ranks)  # the last ranks may have less to do, or nothing
    begin = min(len(tensors), count * dist.get_rank())
    # Repeated where there are too few: what all ranks send must be of one size.
    own = work((tensors[begin : begin + count] + [tensors[0]] * count)[:count]).contiguous()
    gathered = own.new_empty((ranks * count, *own.shape[1:]))
    dist.all_gather(list(gathered.chunk(ranks)), own)
    return gathered[: len(tensors)]
