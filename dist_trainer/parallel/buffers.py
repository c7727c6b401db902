"""A model's buffers: BatchNorm's statistics, and other state that a forward pass may change without gradients."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_trainer.distributed.context import DistributedContext


class Buffers:
    """The buffers that `model` has when this is created, also if its modules replace their tensors later."""

    def __init__(self, model: nn.Module, world: DistributedContext) -> None:
        self._world = world
        modules = list(model.modules())
        self._slots = [(module, name, first) for module in modules for name, first in module.named_buffers(recurse=False)]

    def share(self) -> None:
        """Copy rank 0's values to all ranks, as DistributedDataParallel does; each rank's batches have changed its own.

        One broadcast per dtype and device.
        """
        if self._world.world_size == 1:
            return
        groups: dict[Any, list[Tensor]] = {}
        for tensor in self._tensors():
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for tensors in groups.values():
            values = torch.cat([tensor.detach().flatten() for tensor in tensors])
            dist.broadcast(values, src=0)
            if not self._world.is_main:
                for tensor, value in zip(tensors, values.split([tensor.numel() for tensor in tensors]), strict=True):
                    tensor.detach().copy_(value.view_as(tensor))

    @contextmanager
    def unchanged(self) -> Generator[None]:
        """Inside, buffers may change; afterwards they have their previous tensors and values again."""
        before = [getattr(module, name) for module, name, _ in self._slots]
        copies = [value.detach().clone() if isinstance(value, Tensor) else value for value in before]
        try:
            yield
        finally:
            for (module, name, _), value, copy in zip(self._slots, before, copies, strict=True):
                if isinstance(value, Tensor) and not _is_expanded(value):
                    value.detach().copy_(copy)
                setattr(module, name, value)

    def _tensors(self) -> list[Tensor]:
        """The buffers as all ranks can exchange them, with equal sizes: in place of one whose size has changed, such as a table
        that grows with the longest sequence so far, its first tensor.
        """
        pairs = [(getattr(module, name), first) for module, name, first in self._slots]
        return [now if isinstance(now, Tensor) and now.shape == first.shape else first for now, first in pairs]


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several elements share memory: torch does not write to such a tensor in place."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
