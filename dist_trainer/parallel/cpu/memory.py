"""Memory of a process that computes on a CPU: memory that one step frees is reused by the next one, without the kernel."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager

# From <malloc.h>; see man mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_DEFAULT_MMAP_MAX = 65536
_LARGE = 2**18
"""Bytes from which an allocation is almost always a tensor."""


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for later allocations; returns whether it does.

    Otherwise glibc maps new memory for each large tensor and unmaps it when it is freed, and the kernel fills every page with
    zeros: a tenth of a step on a CPU, or more (docs/decisions/speed.md). The process's peak memory stays about the same, but
    memory is not given back in between. Does nothing if the user has configured malloc, or with another C library.
    """
    return _set({_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0})


@contextmanager
def large_blocks_apart() -> Generator[None]:
    """Inside, large tensors that do not fit in the heap are mapped separately; afterwards freed memory is kept (again).

    For the warm-up before the first step: otherwise a compiler's many small objects would stay in the heap between the
    warm-up's tensors, and leave no room for those of later steps.
    """
    changed = _set({_M_MMAP_THRESHOLD: _LARGE, _M_MMAP_MAX: _DEFAULT_MMAP_MAX})
    try:
        yield
    finally:
        if changed:
            keep_freed_memory()


def _set(options: dict[int, int]) -> bool:
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and all(mallopt(option, value) for option, value in options.items())
