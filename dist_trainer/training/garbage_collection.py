"""Python's garbage collector, run at the same points of a step on all ranks, not whenever one of them has made enough objects.

A collection of everything takes a tenth of a second or more, and while one rank collects, the others wait for its gradients.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

MIDDLE_EVERY, ALL_EVERY = 10, 100
"""Micro-batches between collections of the middle generation, of objects that survived one collection, and of everything."""


class GarbageCollector:
    """Within this context it runs when `collect` is called; afterwards as before. Does nothing if it was disabled."""

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
        """After each micro-batch: new objects, in about 20 us; every so often older ones, or all, in 0.2 ms.

        The first time all includes those made before training: 0.1 to 0.2 s. Those that remain are not examined again.
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
        """Between steps, when no rank waits for another at each batch: the collector runs by itself."""
        if self._calls == 0:
            yield
            return
        gc.enable()
        try:
            yield
        finally:
            gc.disable()
