"""`STRATEGIES`: the ways in which ranks share a model, and what the trainer needs from a wrapped model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_trainer.config.registry import build
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.parallel.compile import compile_model, should_compile
from dist_trainer.parallel.cpu.memory import keep_freed_memory
from dist_trainer.parallel.ddp import LossDDP, ddp


def single(model: nn.Module, world: DistributedContext) -> nn.Module:
    """`model` itself, for one process."""
    return model


STRATEGIES: dict[str, Callable[[nn.Module, DistributedContext], nn.Module]] = {"single": single, "ddp": ddp}


def parallelize(
    model: nn.Module,
    world: DistributedContext,
    *,
    strategy: str = "auto",
    compile: bool | Literal["auto"] = "auto",
    flops: float | None = None,
    varying_length: bool = False,
) -> nn.Module:
    """`model` as the ranks train it together: compiled if `compile` says so, then wrapped by `strategy`.

    `flops`: floating-point operations of the run, if known, by which `auto` decides. `varying_length`: whether sequences differ
    in length from batch to batch. For all ranks; raises ConfigError on all of them if `compile` is true and one cannot compile.
    """
    if world.device.type == "cpu":
        keep_freed_memory()
    if should_compile(compile, world, flops):
        compile_model(model, varying_length=varying_length)
    name = "ddp" if strategy == "auto" else strategy  # ddp returns the model itself for a single process
    return build(STRATEGIES, name, "distributed.strategy", model, world, kind=nn.Module)


def unwrap(model: nn.Module) -> nn.Module:
    """The module that a strategy wrapped."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def compute_loss(model: nn.Module, loss_function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
    """`loss_function` of `batch` and the module that `ddp` wrapped; with a user's strategy, its wrapper."""
    return model.compute_loss(loss_function, batch) if isinstance(model, LossDDP) else loss_function(model, batch)


def gradient_sync(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """A context in which backward passes exchange gradients, or do not; only a step's last micro-batch needs to."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def first_sync_differs(model: nn.Module, world: DistributedContext) -> bool:
    """Whether the first exchange of gradients sums in another order than later ones, which changes the last bits.

    DistributedDataParallel sorts its buckets by the order in which gradients arrived in its first backward pass, unless it
    looks for unused parameters. Two ranks' sums have only one order.
    """
    return world.world_size > 2 and isinstance(model, DistributedDataParallel) and not model.find_unused_parameters
