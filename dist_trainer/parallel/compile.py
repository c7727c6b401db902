"""torch.compile: whether it pays, what of a model is compiled, and how."""

from __future__ import annotations

import logging
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from dist_trainer.distributed.collectives import gather_objects
from dist_trainer.distributed.compilers import missing_compiler
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError
from dist_trainer.parallel.compile_cache import enable_compile_cache

try:
    from torch._functorch import config as functorch_config
except ImportError:
    functorch_config = None

log = logging.getLogger(__name__)

WORTH_COMPILING = {"cuda": 1e16, "cpu": 1e14}
"""Floating-point operations of a run from which on `auto` compiles.

At 1e14 a second on a GPU and 1e11 on a few CPU cores these are 2 and 17 minutes, of which compiled code spares some fifth;
compiling takes about half a minute. A property of the run alone, not of the machine or the number of ranks: what it decides
changes the last bits of every loss.
"""
BAN_RECOMPUTE = "ban_recompute_materialized_backward"
CACHES_AUTOGRAD_FUNCTIONS = "autograd_cache_allow_custom_autograd_functions"
_COMPILED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def should_compile(choice: bool | Literal["auto"], world: DistributedContext, flops: float | None) -> bool:
    """What precision.compile means for a run of `flops` operations on this device; None: unknown, then it is taken for long
    on a GPU and for short on a CPU. For all ranks, which decide alike: where one of them cannot compile, `auto` is false, and
    ConfigError is raised where it is asked for.
    """
    if not (_is_long(flops, world.device) if choice == "auto" else choice):
        return False
    missing = next(filter(None, gather_objects(missing_compiler(world.device), world)), None)
    if missing is None:
        return True
    if choice != "auto":
        raise ConfigError(f"precision.compile: true needs {missing}")
    if world.is_main:
        log.info("this run is long enough to be compiled, and is not: precision.compile: auto needs %s", missing)
    return False


def _is_long(flops: float | None, device: torch.device) -> bool:
    return device.type == "cuda" if flops is None else flops >= WORTH_COMPILING.get(device.type, 0.0)


def compile_parts(model: nn.Module, *, varying_length: bool = False) -> None:
    """Compile each of `model.compile_units` in place, or the whole of other models.

    With sequences of varying length, once more for any length when the second one comes. Without, modules that have a
    `static_sequence_length` are told so.
    """
    enable_compile_cache()
    for module in model.modules():
        if hasattr(module, "static_sequence_length"):
            module.static_sequence_length = not varying_length  # type: ignore[assignment]
    parts: Any = getattr(model, "compile_units", [model])
    for part in parts:
        part.compile(dynamic=None if varying_length else False)
    _COMPILED.add(model)


def compiling_for_cpu(model: nn.Module) -> AbstractContextManager[object]:
    """Within, `model` is compiled by two private switches of torch's, as far as this torch has them.

    BAN_RECOMPUTE, off, keeps less for the backward pass, which recomputes what is cheap: above all weights cast to bfloat16,
    where there are any. Of a DecoderLM of 124M parameters that is 0.14 GiB, at no cost in time (docs/decisions/speed.md).
    CACHES_AUTOGRAD_FUNCTIONS, on, has the next start find also attention by parallel/cpu/attention.py. An autograd function's
    operations are in the key, but of a Python function that it hides from torch the name alone: so it is off for other models.
    """
    switches = {BAN_RECOMPUTE: False}
    if any(getattr(module, "static_sequence_length", False) for module in model.modules()):
        switches[CACHES_AUTOGRAD_FUNCTIONS] = True
    present = {name: value for name, value in switches.items() if hasattr(functorch_config, name)}
    return functorch_config.patch(present) if present else nullcontext()  # type: ignore[attr-defined]


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_parts` was called for `model`."""
    return model in _COMPILED
