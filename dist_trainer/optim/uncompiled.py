"""torch's optimizers without its compiler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` beneath its decorators.

    torch wraps methods of optimizers so that its compiler leaves them alone, and imports the compiler to say so: a second or
    two of every start, whether or not anything is compiled. Where a later torch wraps them no more, this changes nothing.
    """
    return inspect.unwrap(method)


class EagerOptimizer(Optimizer):
    """What all optimizers share, for steps that are not themselves compiled."""

    add_param_group = plain(Optimizer.add_param_group)
    zero_grad = plain(Optimizer.zero_grad)
    state_dict = plain(Optimizer.state_dict)
    load_state_dict = plain(Optimizer.load_state_dict)
