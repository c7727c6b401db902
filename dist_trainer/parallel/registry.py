"""`STRATEGIES`: how several ranks share one model, and the two things the trainer needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_trainer.config.lookup import build
from dist_trainer.distributed.world import World
from dist_trainer.parallel.ddp import ddp


def single(model: nn.Module, world: World) -> nn.Module:
    """The model as it stands, for one process."""
    return model


STRATEGIES: dict[str, Callable[[nn.Module, World], nn.Module]] = {"single": single, "ddp": ddp}


def parallelize(
    model: nn.Module,
    world: World,
    *,
    strategy: str = "auto",
    compile: bool | Literal["auto"] = "auto",
    varying_length: bool = False,
) -> nn.Module:
    """`model` as several ranks train it together: compiled first (auto: on GPUs), then wrapped by `strategy`.

    `varying_length`: of the sequences, from batch to batch.
    """
    if is_compiled(compile, world):
        compile_blocks(model, varying_length=varying_length)
    row = "ddp" if strategy == "auto" else strategy  # which leaves a single process as it is
    return build(STRATEGIES, row, "distributed.strategy", model, world, kind=nn.Module)


def is_compiled(compile: bool | Literal["auto"], world: World) -> bool:
    """What precision.compile means here: `auto` compiles on GPUs."""
    return compile is True or (compile == "auto" and world.device.type == "cuda")


def compile_blocks(model: nn.Module, *, varying_length: bool = False) -> None:
    """Compile each of `model.compiled_parts` in place, or the whole of other models.

    With sequences of varying length, once more for any length when the second one comes.
    """
    for part in getattr(model, "compiled_parts", [model]):
        part.compile(dynamic=None if varying_length else False)


def unwrap(model: nn.Module) -> nn.Module:
    """The module that a strategy wrapped."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Whether the backward pass inside exchanges gradients; only a step's last micro-batch needs to."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
