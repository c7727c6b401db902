"""What a strategy lays around a model."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The module that a strategy wrapped."""
    return model.module if isinstance(model, DistributedDataParallel) else model
