"""Modules without memory, from there onto a device, or with memory at once: none draws weights that others are to replace."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)

FIRST_WEIGHTS = {nn.init.__name__, "transformers.initialization"}
"""Modules whose functions give weights their first values; transformers puts its own in the place of torch's."""


@contextmanager
def meta_init() -> Generator[None]:
    """Modules made inside know their shapes alone. torch.nn.init does nothing: on the meta device it would import torch's
    compiler to compute shapes that are known, a second or two of every start.
    """
    with torch.device("meta"), SkipInit():
        yield


class SkipInit(TorchFunctionMode):
    """The functions of torch.nn.init by which linear layers and embeddings begin leave parameters made inside as they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in FIRST_WEIGHTS:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter):  # what a buffer holds, no file may bring back
                return tensor
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
