"""Temporary evaluation mode, as for validation during training."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Inside, `model` is in evaluation mode; afterwards each of its modules returns to its previous mode, which for some, such
    as a frozen BatchNorm, may also be evaluation mode.
    """
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():  # parents first: `train` changes the children too
            if module.training != training:
                module.train(training)
