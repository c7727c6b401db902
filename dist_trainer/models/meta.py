"""Modules without memory, and from there onto a device: neither draws weights that others are to replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules made inside know their shapes alone. torch.nn.init does nothing: on the meta device it would import torch's
    compiler to compute shapes that are known, a second or two of every start.
    """
    with torch.device("meta"), _NoFirstWeights():
        yield


class _NoFirstWeights(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def materialize(model: Module, device: torch.device) -> Module:
    """Give the parameters of `model`, which are on the meta device, memory on `device`, uninitialised. It has no buffers."""
    assert not list(model.buffers()), "buffers hold values that nobody would draw"
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:  # else it is tied to one that was
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
    return model
