"""`STRATEGIES`: how several ranks share one model, and what the trainer needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_trainer.config.registry import build
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.parallel.compile import compile_parts, should_compile
from dist_trainer.parallel.cpu.memory import keep_freed_memory
from dist_trainer.parallel.ddp import LossDDP, ddp


def single(model: nn.Module, world: DistributedContext) -> nn.Module:
    """The model as it stands, for one process."""
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
    """`model` as several ranks train it together: compiled first, where asked for or worth it, then wrapped by `strategy`.

    `flops`: floating-point operations of the whole run, where known, by which `auto` decides. `varying_length`: of the
    sequences, from batch to batch. For all ranks; raises ConfigError on each where one of them cannot compile.
    """
    if world.device.type == "cpu":
        keep_freed_memory()
    if should_compile(compile, world, flops):
        compile_parts(model, varying_length=varying_length)
    row = "ddp" if strategy == "auto" else strategy  # which leaves a single process as it is
    return build(STRATEGIES, row, "distributed.strategy", model, world, kind=nn.Module)


def unwrap(model: nn.Module) -> nn.Module:
    """The module that a strategy wrapped."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def compute_loss(model: nn.Module, loss_function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
    """`loss_function` of `batch` and of the module that `ddp` wrapped; a strategy of the user's own passes its wrapper."""
    return model.compute_loss(loss_function, batch) if isinstance(model, LossDDP) else loss_function(model, batch)


def gradient_sync(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Whether the backward pass inside exchanges gradients; only a step's last micro-batch needs to."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
