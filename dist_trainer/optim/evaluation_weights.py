"""Optimizers such as schedule-free ones, whose weights for evaluation differ from those they train: `train()` and `eval()`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def has_evaluation_weights(optimizer: Optimizer) -> bool:
    """Whether `optimizer` has the two methods, which switch the parameters between the two sets of weights in place."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@contextmanager
def training_weights(optimizer: Optimizer) -> Generator[None]:
    """Inside, the parameters are the weights in training; afterwards those for evaluation, which are saved too."""
    modes: Any = optimizer
    if not has_evaluation_weights(optimizer):
        yield
        return
    modes.train()
    try:
        yield
    finally:
        modes.eval()


@contextmanager
def evaluation_weights(optimizer: Optimizer) -> Generator[dict[nn.Parameter, Tensor]]:
    """Inside, the parameters are the weights for evaluation. Yields those in training, which are restored bit for bit
    afterwards; nothing ({}) if the optimizer does not distinguish the two.
    """
    modes: Any = optimizer
    if not has_evaluation_weights(optimizer):
        yield {}
        return
    trained = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
    modes.eval()
    try:
        yield trained
    finally:
        modes.train()
        _set_weights(trained)


def set_training_weights(optimizer: Optimizer, weights: dict[nn.Parameter, Tensor]) -> None:
    """Set the weights in training of `optimizer`, whose state was just restored, to these values."""
    if weights and has_evaluation_weights(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
        _set_weights(weights)


@torch.no_grad()
def _set_weights(weights: dict[nn.Parameter, Tensor]) -> None:
    for parameter, values in weights.items():
        parameter.copy_(values)
