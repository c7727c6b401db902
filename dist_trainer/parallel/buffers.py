"""A model's buffers: BatchNorm's statistics, and whatever else its forward pass may change without a gradient."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_trainer.distributed.context import DistributedContext


class Buffers:
    """Those that `model` has when this is made, wherever its modules put new tensors in their places later."""

    def __init__(self, model: nn.Module, world: DistributedContext) -> None:
        self._world = world
        modules = list(model.modules())
        self._places = [(module, name, first) for module in modules for name, first in module.named_buffers(recurse=False)]

    def share(self) -> None:
        """Rank 0's values on all ranks, as DistributedDataParallel does: each rank has changed its own by its own batches.

        One broadcast for all buffers of a type.
        """
        if self._world.world_size == 1:
            return
        alike: dict[Any, list[Tensor]] = {}
        for tensor in self._tensors():
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for tensors in alike.values():
            values = torch.cat([tensor.detach().flatten() for tensor in tensors])
            dist.broadcast(values, src=0)
            if not self._world.is_main:
                for tensor, value in zip(tensors, values.split([tensor.numel() for tensor in tensors]), strict=True):
                    tensor.detach().copy_(value.view_as(tensor))

    @contextmanager
    def unchanged(self) -> Generator[None]:
        """What happens inside leaves no trace in them."""
        before = [getattr(module, name) for module, name, _ in self._places]
        copies = [value.detach().clone() if isinstance(value, Tensor) else value for value in before]
        try:
            yield
        finally:
            for (module, name, _), value, copy in zip(self._places, before, copies, strict=True):
                if isinstance(value, Tensor) and not _is_expanded(value):
                    value.detach().copy_(copy)
                setattr(module, name, value)

    def _tensors(self) -> list[Tensor]:
        """What all ranks can exchange, which needs equal sizes on all of them: the buffers, but instead of one whose size has
        changed, such as a table that grows with the longest sequence so far, the one that was there at first.
        """
        pairs = [(getattr(module, name), first) for module, name, first in self._places]
        return [now if isinstance(now, Tensor) and now.shape == first.shape else first for now, first in pairs]


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several of its elements are the same number in memory: torch lets nobody write to such a tensor in place."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
