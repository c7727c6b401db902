"""Distributed data parallelism: every rank holds the full model and averages its gradients with the others'."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.parallel.compile import is_compiled

_UNUSED = "unused_by_any_loss"

assert hasattr(DistributedDataParallel, "_run_ddp_forward"), "LossDDP overrides it; this torch has no such method"


def ddp(model: nn.Module, world: DistributedContext) -> nn.Module:
    """`model` in torch's DistributedDataParallel, with rank 0's weights and buffers; with a single process, `model` itself."""
    if world.world_size == 1:
        return model
    # Unless a model promises to use all parameters, some batches may leave some out, even on some ranks only.
    may_be_unused = not getattr(model, "uses_all_parameters", False)
    has_compiled_units = is_compiled(model) and hasattr(model, "compile_units")
    with _one_unused_parameter(model) if may_be_unused else nullcontext():
        wrapped = (DDPNoGraphSplit if has_compiled_units else LossDDP)(
            model,
            find_unused_parameters=may_be_unused,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    wrapped.broadcast_buffers = False  # not before each forward pass: the trainer shares them at the end of each step
    return wrapped


@contextmanager
def _one_unused_parameter(model: nn.Module) -> Generator[None]:
    """Inside, `model` has an extra parameter, which DistributedDataParallel will always find unused.

    If none is unused, torch advises on each rank not to look for them, from C++, so that no warnings filter can suppress it.
    """
    trained = (parameter.detach() for parameter in model.parameters() if parameter.requires_grad)
    model.register_parameter(_UNUSED, nn.Parameter(next(trained, torch.zeros(0)).new_zeros(1)))
    try:
        yield
    finally:
        delattr(model, _UNUSED)


@dataclass(frozen=True)
class _Loss:
    """What `LossDDP.compute_loss` passes through DistributedDataParallel's forward."""

    function: Callable[[nn.Module, Any], Tensor]
    batch: Any


class LossDDP(DistributedDataParallel):
    """DistributedDataParallel whose forward can be a complete loss function, which gets the wrapped module.

    So the loss alone decides which parameters took part, not everything that the model returns; and a loss function may call
    the module more than once, or call its other methods, on several ranks as on one.
    """

    def compute_loss(self, loss_function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """`loss_function(module, batch)`; its backward pass exchanges gradients."""
        return self(_Loss(loss_function, batch))

    def _run_ddp_forward(self, *inputs: Any, **named: Any) -> Any:
        # torch's method, except for the loss. In the context, torch's compiler splits graphs where DDP's buckets end.
        with self._graph_splitting():
            if inputs and isinstance(inputs[0], _Loss):
                return inputs[0].function(self.module, inputs[0].batch)
            return self.module(*inputs, **named)

    def _graph_splitting(self) -> AbstractContextManager[None]:
        return getattr(self, "_inside_ddp_forward", nullcontext)()


class DDPNoGraphSplit(LossDDP):
    """DistributedDataParallel for a model with `compile_units`, each of which is compiled by itself.

    torch's compiler splits a data-parallel model's graphs where buckets end, so that the exchange of the last layers' gradients
    can start early. Units that are compiled by themselves need no split; and splitting them, on several ranks only, would give
    other code with other last bits.
    """

    def _graph_splitting(self) -> AbstractContextManager[None]:
        return nullcontext()
