"""A model's buffers: BatchNorm's statistics, and whatever else its forward pass may change without a gradient."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_trainer.distributed.world import World


class Buffers:
    """Those that `model` has when this is made, wherever its modules put new tensors in their places later."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._places = [(module, name) for module in model.modules() for name, _ in module.named_buffers(recurse=False)]

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
        before = [getattr(module, name) for module, name in self._places]
        copies = [value.detach().clone() if isinstance(value, Tensor) else value for value in before]
        try:
            yield
        finally:
            for (module, name), value, copy in zip(self._places, before, copies, strict=True):
                if isinstance(value, Tensor):
                    value.detach().copy_(copy)
                setattr(module, name, value)

    def _tensors(self) -> list[Tensor]:
        values = [getattr(module, name) for module, name in self._places]
        return [value for value in values if isinstance(value, Tensor)]
