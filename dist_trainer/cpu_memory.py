"""How a process that computes on a CPU holds its memory: what one step freed, the next one has back without the kernel."""

from __future__ import annotations

import ctypes
import os

# Of <malloc.h>, man mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for whoever allocates next; whether it does.

    Else it maps each large tensor anew and unmaps it when it is freed, and the kernel fills every page of it with zeros
    first: a tenth of a step on a CPU and more (docs/decisions/speed.md). The most memory that the process ever holds stays
    about the same, but it is not given back in between. What a user has set of malloc stands; with another C library nothing
    happens.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_MMAP_MAX, 0))
