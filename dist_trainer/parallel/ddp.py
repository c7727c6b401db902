"""Distributed data parallelism: every rank holds the whole model and averages its gradients with the others'."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.parallel.compile import is_compiled

_COMPILER = "torch._dynamo"
_UNUSED = "unused_by_any_loss"


def ddp(model: nn.Module, world: DistributedContext) -> nn.Module:
    """`model` in torch's DistributedDataParallel, with rank 0's weights and buffers. A single process trains it as it is."""
    if world.world_size == 1:
        return model
    # A model that does not promise to use all parameters may leave out some in some batches, and on some ranks alone.
    may_leave_out = not getattr(model, "uses_all_parameters", False)
    with _one_unused_parameter(model) if may_leave_out else nullcontext():
        wrapped = _kind_for(model)(
            model,
            find_unused_parameters=may_leave_out,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    wrapped.broadcast_buffers = False  # not before each forward pass, as the trainer shares them at the end of each step
    return wrapped


@contextmanager
def _one_unused_parameter(model: nn.Module) -> Generator[None]:
    """Inside, `model` has one more parameter, for DistributedDataParallel to keep and find unused.

    Where it finds none that are, torch advises on each rank against looking for them. It does so from C++, where no filter of
    warnings reaches.
    """
    trained = (parameter.detach() for parameter in model.parameters() if parameter.requires_grad)
    model.register_parameter(_UNUSED, nn.Parameter(next(trained, torch.zeros(0)).new_zeros(1)))
    try:
        yield
    finally:
        delattr(model, _UNUSED)


def _kind_for(model: nn.Module) -> type[LossDDP]:
    if not is_compiled(model):
        return LossDDP if _COMPILER in sys.modules else EagerDDP
    return DDPNoGraphSplit if hasattr(model, "compile_units") else LossDDP


@dataclass(frozen=True)
class _Loss:
    """What `LossDDP.compute_loss` passes through DistributedDataParallel's forward."""

    function: Callable[[nn.Module, Any], Tensor]
    batch: Any


class LossDDP(DistributedDataParallel):
    """DistributedDataParallel whose forward can be the whole loss function, which gets the module itself.

    So the loss alone decides which parameters took part, not all that the model returns; and a loss function may call the
    module more than once, or call its other methods, on several ranks as on one.
    """

    _cuts_graphs = True

    def compute_loss(self, loss_function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """`loss_function(module, batch)`; its backward pass exchanges gradients."""
        return self(_Loss(loss_function, batch))

    def _run_ddp_forward(self, *inputs: Any, **named: Any) -> Any:
        # torch's own, but for the loss; the context tells its compiler which module runs, so that it cuts graphs.
        context = getattr(self, "_inside_ddp_forward", nullcontext) if self._cuts_graphs else nullcontext
        with context():
            if inputs and isinstance(inputs[0], _Loss):
                return inputs[0].function(self.module, inputs[0].batch)
            return self.module(*inputs, **named)


class DDPNoGraphSplit(LossDDP):
    """DistributedDataParallel for a model of which parts are compiled, each for itself.

    torch's compiler cuts a data-parallel model's graphs where buckets end, so that the exchange of the last gradients need not
    wait for the first. Where each block has a graph of its own that is so anyhow, and cut in the middle of it, on several ranks
    alone, it would be other code with other last bits.
    """

    _cuts_graphs = False


class EagerDDP(DDPNoGraphSplit):
    """DistributedDataParallel that does without torch's compiler, for a model of which nothing is compiled.

    To ask it whether it wants graphs cut where buckets end, torch imports it: three seconds of every rank's start.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        with _compiler_that_leaves_all_as_it_is():
            super().__init__(*arguments, **named)


@contextmanager
def _compiler_that_leaves_all_as_it_is() -> Generator[None]:
    """In place of torch's, which would be imported by the question; who asks anything else gets the real one's answer."""
    utils = _StandIn(f"{_COMPILER}.utils", get_optimize_ddp_mode=lambda: "no_optimization")
    stand_in = _StandIn(_COMPILER, utils=utils)
    torch._dynamo = stand_in  # type: ignore[assignment]
    try:
        yield
    finally:
        if torch._dynamo is stand_in:
            del torch._dynamo


class _StandIn:
    """A module, imported once something is asked of it that is not among `answers`."""

    def __init__(self, module: str, **answers: Any) -> None:
        self._module = module
        vars(self).update(answers)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)
