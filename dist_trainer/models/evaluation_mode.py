"""A model in evaluation mode for a while, as when it is validated in the middle of training."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """`model` in evaluation mode inside; after that each of its modules is in the mode it was in before.

    That may be evaluation mode for some of them, such as a frozen BatchNorm.
    """
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():  # parents first: `train` changes the children too
            if module.training != training:
                module.train(training)
