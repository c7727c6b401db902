"""Time limits of tests were written on an idle machine. Here: how much longer they must be on this one, now."""

from __future__ import annotations

import os
import time

_ROUNDS = 4_000_000
_SECONDS_OF_ROUNDS = 0.1
"""Processor seconds that `_work` takes on the machine whose limits the tests give (a core of an AMD EPYC 9005, Python 3.11)."""


def allowed(seconds: float) -> float:
    """`seconds` on an idle machine, as seconds on this one: longer if its processors are slower, or wanted by others."""
    return seconds * slowness()


def slowness() -> float:
    """1 or more: the time that work takes now, as a multiple of its time on an idle machine. Takes a tenth of a second."""
    began, began_cpu = time.perf_counter(), time.process_time()
    _work()
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    # Others may have been busier a moment ago, while what is being judged was running.
    processes_per_core = os.getloadavg()[0] / (os.cpu_count() or 1)
    return max(1.0, cpu / _SECONDS_OF_ROUNDS) * max(1.0, wall / cpu, processes_per_core)


def _work() -> int:
    total = 0
    for number in range(_ROUNDS):
        total += number & 7
    return total
