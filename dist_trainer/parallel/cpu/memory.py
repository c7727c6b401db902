"""How a process that computes on a CPU holds its memory: what one step freed, the next one has back without the kernel."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager

# Of <malloc.h>, man mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_DEFAULT_MMAP_MAX = 65536
_LARGE = 2**18
"""Bytes: of tensors, and hardly anything else."""


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for whoever allocates next; whether it does.

    Else it maps each large tensor anew and unmaps it when it is freed, and the kernel fills every page of it with zeros
    first: a tenth of a step on a CPU and more (docs/decisions/speed.md). The most memory that the process ever holds stays
    about the same, but it is not given back in between. What a user has set of malloc stands; with another C library nothing
    happens.
    """
    return _set({_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0})


@contextmanager
def large_blocks_apart() -> Generator[None]:
    """Within, large tensors that find no room in the heap are mapped by themselves; then freed memory is kept (again).

    For what comes before the steps: a compiler's many small objects would lie among a rehearsal's tensors for good, and steps
    find no room for theirs between them.
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
