"""Distributed data parallelism: every rank holds the full model, and ranks average their gradients. Also the model's buffers,
such as BatchNorm's statistics, which a forward pass changes without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.parallel.compile import is_compiled

BucketHook = Callable[[dist.GradBucket], Future[Tensor]]
_UNUSED = "unused_by_any_loss"

assert hasattr(DistributedDataParallel, "_run_ddp_forward"), "LossDDP overrides it; this torch has no such method"


def ddp(model: nn.Module, world: DistributedContext) -> nn.Module:
    """`model` in torch's DistributedDataParallel, with rank 0's weights and buffers; with a single process, `model` itself."""
    if world.world_size == 1:
        return model
    # Unless a model promises to use all parameters, some batches may leave some out, even on some ranks only.
    may_be_unused = not getattr(model, "uses_all_parameters", False)
    with _one_unused_parameter(model) if may_be_unused else nullcontext():
        wrapped = LossDDP(
            model,
            find_unused_parameters=may_be_unused,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    wrapped.broadcast_buffers = False  # the trainer shares them at the end of each step, not before each forward pass
    wrapped.splits_graphs = not (is_compiled(model) and hasattr(model, "compile_units"))
    return wrapped


@contextmanager
def _one_unused_parameter(model: nn.Module) -> Generator[None]:
    """Inside, `model` has an extra parameter, which DistributedDataParallel will always find unused.

    If none is unused, torch warns on each rank that it looked for them in vain, from C++, so no filter can suppress it.
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

    splits_graphs = True
    """Whether torch's compiler splits graphs where buckets end, so that the exchange of the last layers' gradients can start
    early. `compile_units`, which are compiled one by one, need no split; and splitting them, on several ranks only, would give
    other code with other last bits.
    """
    bucket_hook: BucketHook | None = None

    def compute_loss(self, loss_function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """`loss_function(module, batch)`; its backward pass exchanges gradients."""
        return self(_Loss(loss_function, batch))

    def reduce_buckets_with(self, hook: BucketHook) -> None:
        """Let `hook` sum each bucket of gradients over the ranks, instead of an average by all-reduce."""
        is_first, self.bucket_hook = self.bucket_hook is None, hook
        if is_first:  # DistributedDataParallel takes a hook only once
            # Not a function: torch would read its annotations, which are strings here.
            self.register_comm_hook(self, lambda model, bucket: model.bucket_hook(bucket))

    def average_buckets(self) -> None:
        """Average each bucket by all-reduce again, as without a hook: DistributedDataParallel cannot remove one."""
        if self.bucket_hook is not None:
            self.bucket_hook = partial(allreduce_hook, self.process_group)

    def _run_ddp_forward(self, *inputs: Any, **named: Any) -> Any:
        # torch's method, except for the loss; it always splits.
        with getattr(self, "_inside_ddp_forward", nullcontext)() if self.splits_graphs else nullcontext():
            if inputs and isinstance(inputs[0], _Loss):
                return inputs[0].function(self.module, inputs[0].batch)
            return self.module(*inputs, **named)


class Buffers:
    """The buffers that `model` has when this is created, even if its modules replace their tensors later."""

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
        restore = self.remember()
        try:
            yield
        finally:
            restore()

    def remember(self) -> Callable[[], None]:
        """A function that gives buffers the tensors and values again that they have now."""
        before = [getattr(module, name) for module, name, _ in self._slots]
        copies = [value.detach().clone() if isinstance(value, Tensor) else value for value in before]

        def restore() -> None:
            for (module, name, _), value, copy in zip(self._slots, before, copies, strict=True):
                if isinstance(value, Tensor) and not _is_expanded(value):
                    value.detach().copy_(copy)
                setattr(module, name, value)

        return restore

    def _tensors(self) -> list[Tensor]:
        """The buffers as all ranks can exchange them, with equal sizes: in place of one whose size has changed, such as a table
        that grows with the longest sequence so far, its first tensor.
        """
        pairs = [(getattr(module, name), first) for module, name, first in self._slots]
        return [now if isinstance(now, Tensor) and now.shape == first.shape else first for now, first in pairs]


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several elements share memory: torch does not write to such a tensor in place."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
