"""What torch calls to compile code, and whether this machine has it."""

from __future__ import annotations

import os
import shutil
from functools import cache

import torch

try:
    from torch.utils._triton import has_triton
except ImportError:
    has_triton = None


def missing_compiler(device: torch.device) -> str | None:
    """What compiling for `device` needs and this machine lacks, with the remedy; None where it lacks nothing."""
    if device.type == "cuda":
        return _missing_on_gpu()
    if cpp_compiler() is not None:
        return None
    return (
        "a C++ compiler on a CPU, and neither g++ nor clang++ is here; install one, name it by the variable CXX, "
        "or set precision.compile to false"
    )


@cache
def _missing_on_gpu() -> str | None:
    """Once a process, since to ask torch about Triton imports its compiler: seconds, where nothing else has done so."""
    if c_compiler() is None:
        return (
            "a C compiler on a GPU, by which Triton builds its launcher, and neither gcc nor clang is here; install one, name "
            "it by the variable CC, or set precision.compile to false"
        )
    if has_triton is not None and not has_triton():
        return (
            "the package triton and a GPU that it has code for (compute capability 7.0 or more), and torch finds none here; "
            "install a torch that brings triton, or set precision.compile to false"
        )
    return None


def cpp_compiler() -> str | None:
    """The C++ compiler that torch would call for CPU code."""
    return _found([os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"])


def c_compiler() -> str | None:
    """The C compiler that Triton would call beside GPU code."""
    return _found([os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])


def _found(names: list[str]) -> str | None:
    return next((found for name in names if (found := shutil.which(name))), None)
