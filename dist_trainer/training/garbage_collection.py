"""Runs Python's garbage collector at the same points of a step on all ranks, not whenever one has made enough objects.

A full collection takes a tenth of a second or more, and while one rank collects, the others wait for its gradients.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

MIDDLE_EVERY, ALL_EVERY = 10, 100
"""Micro-batches between collections of the middle generation (objects that survived one collection), and full collections."""


class GarbageCollector:
    """Inside this context the collector only runs when `collect` is called. Does nothing if it was disabled before."""

    def __init__(self) -> None:
        self._is_open = self._freezes = False
        self._calls = 0

    def __enter__(self) -> GarbageCollector:
        self._is_open = gc.isenabled()
        return self

    def __exit__(self, *error: object) -> None:
        if self._calls:
            gc.enable()
        if self._freezes:
            gc.unfreeze()
        self._is_open = self._freezes = False
        self._calls = 0

    def collect(self) -> None:
        """Call after each micro-batch. Collects new objects, in about 20 us; occasionally older ones, or all, in 0.2 ms.

        The first full collection includes objects made before training: 0.1 to 0.2 s. Survivors are not examined again.
        """
        if not self._is_open:
            return
        if self._calls == 0:
            gc.disable()
        self._calls += 1
        if self._calls % ALL_EVERY:
            gc.collect(0 if self._calls % MIDDLE_EVERY else 1)
            return
        gc.collect()
        if gc.get_freeze_count() == 0:
            gc.freeze()
            self._freezes = True

    @contextmanager
    def automatic(self) -> Generator[None]:
        """For use between steps, when ranks do not wait for each other at each batch: the collector runs by itself inside."""
        if self._calls == 0:
            yield
            return
        gc.enable()
        try:
            yield
        finally:
            gc.disable()
