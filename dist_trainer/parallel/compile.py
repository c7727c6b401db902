"""torch.compile: when it pays, which modules are compiled, with which settings, and where the code is cached."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dist_trainer.config.paths import default_cache_dir
from dist_trainer.distributed.collectives import gather_objects
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.distributed.machine import missing_compiler
from dist_trainer.errors import ConfigError
from dist_trainer.parallel.cpu.attention import has_cpu_attention, install_cpu_attention
from dist_trainer.parallel.cpu.memory import large_blocks_apart

try:
    from torch._functorch import config as functorch_config
except ImportError:
    functorch_config = None

log = logging.getLogger(__name__)

WORTH_COMPILING = {"cuda": 1e16, "cpu": 1e14}
"""Floating-point operations of a run from which `auto` compiles.

At 1e14 per second on a GPU and 1e11 on a few CPU cores these take 2 and 17 minutes. Compiled code saves about a fifth of that,
and compiling takes about half a minute. This depends on the run only, not on the machine or the number of ranks, because
compiling changes the last bits of every loss.
"""
BAN_RECOMPUTE = "ban_recompute_materialized_backward"
CACHES_AUTOGRAD_FUNCTIONS = "autograd_cache_allow_custom_autograd_functions"
_COMPILED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def should_compile(choice: bool | Literal["auto"], world: DistributedContext, flops: float | None) -> bool:
    """Whether to compile for `precision.compile: choice` in a run of `flops` operations (None: unknown; counts as long on a
    GPU and as short on a CPU).

    A collective: all ranks get the same answer. If a rank has no compiler, `auto` gives False, and True raises ConfigError.
    """
    if not (_is_long(flops, world.device) if choice == "auto" else choice):
        return False
    missing = next(filter(None, gather_objects(missing_compiler(world.device), world)), None)
    if missing is None:
        return True
    if choice != "auto":
        raise ConfigError(f"precision.compile: true needs {missing}")
    if world.is_main:
        log.info("running without torch.compile although the run is long: it needs %s", missing)
    return False


def _is_long(flops: float | None, device: torch.device) -> bool:
    return device.type == "cuda" if flops is None else flops >= WORTH_COMPILING.get(device.type, 0.0)


def compile_model(model: nn.Module, *, varying_length: bool = False) -> None:
    """Compile each of `model.compile_units` in place, or the model itself if it has none.

    If sequences vary in length, the second length triggers one more compilation, for any length. If they do not, attention on
    a CPU may be replaced by a faster kernel (parallel/cpu/attention.py).
    """
    enable_compile_cache()
    if not varying_length:
        install_cpu_attention(model)
    units: Any = getattr(model, "compile_units", [model])
    for unit in units:
        unit.compile(dynamic=None if varying_length else False)
    _COMPILED.add(model)


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_model` was called for `model`."""
    return model in _COMPILED


@contextmanager
def compile_settings(model: nn.Module, device: torch.device, *, number_format: str) -> Generator[None]:
    """The settings under which `model` is compiled for training on `device` in `number_format`."""
    with ExitStack() as settings:
        settings.enter_context(number_format_in_key(number_format))
        if device.type == "cpu":
            settings.enter_context(large_blocks_apart())
            settings.enter_context(cpu_compile_switches(model))
        yield


def cpu_compile_switches(model: nn.Module) -> AbstractContextManager[object]:
    """Inside, two private switches of torch are set, as far as this torch has them.

    BAN_RECOMPUTE off: less is kept for the backward pass, which recomputes what is cheap, above all weights cast to bfloat16.
    For a DecoderLM of 124M parameters this saves 0.14 GiB and costs no time (docs/decisions/speed.md).
    CACHES_AUTOGRAD_FUNCTIONS on: the next start also finds the code of parallel/cpu/attention.py. Only for models with that
    attention: the cache key holds an autograd function's operations, but only the name of a Python function that it hides from
    torch.
    """
    switches = {BAN_RECOMPUTE: False}
    if has_cpu_attention(model):
        switches[CACHES_AUTOGRAD_FUNCTIONS] = True
    present = {name: value for name, value in switches.items() if hasattr(functorch_config, name)}
    return functorch_config.patch(present) if present else nullcontext()  # type: ignore[attr-defined]


def number_format_in_key(name: str) -> AbstractContextManager[object]:
    """Inside, this thread only finds compiled code that was cached for the number format `name`.

    torch 2.11 takes a graph compiled under autocast to bfloat16 for the same graph under autocast to float16, and silently
    computes in the wrong format; 2.13 does not.
    """
    config: Any = torch.compiler.config
    if not hasattr(config, "cache_key_tag"):
        return nullcontext()
    return config.patch(cache_key_tag=f"{config.cache_key_tag} {name}".strip())


def enable_compile_cache() -> None:
    """Have torch keep compiled code in the user's cache folder, so that a run that is started again finds it, on any node.

    Not in the run's folder: it is code, and a run may come from a stranger. For the same reason not in a folder that others
    can write to; torch then uses its own default, as it does if the user has set one.
    """
    folder = default_cache_dir() / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    if only_this_user_can_write(folder):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        if torch.cuda.is_available():
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def only_this_user_can_write(folder: Path) -> bool:
    """Whether `folder` is a folder of this user, not a link, and nobody else can write to it."""
    status = folder.lstat()
    return not folder.is_symlink() and status.st_uid == os.getuid() and not status.st_mode & 0o022
