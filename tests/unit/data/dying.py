"""A process that dies while it builds a token store."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_trainer.data import store_building


def kill_a_build(build: Callable[[], Any], cache: Path, *, shards: int, joining: bool = False) -> Path:
    """Run `build` in a process that is killed once it has written so many shards, or while it joins them; what it left."""

    def run() -> None:
        function, calls = ("sync", 1) if joining else ("_build_shard", shards + 1)
        real, left = getattr(store_building, function), [calls]

        def call(*arguments: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(store_building, function, call)
        build()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    [staging] = (cache / "tokens").glob(".building-*")
    assert len(list(staging.glob("shard-*.npz"))) == shards
    return staging
