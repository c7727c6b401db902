"""Temporary stand-in."""

from __future__ import annotations

from typing import Any, Protocol

from dist_trainer.distributed.world import World
from dist_trainer.tracking.console_tracker import ConsoleTracker
from dist_trainer.tracking.jsonl_tracker import JsonlTracker
from dist_trainer.tracking.run_context import RunContext


class Tracker(Protocol):
    def log(self, line: dict[str, Any]) -> None: ...
    def sync(self) -> None: ...
    def close(self, *, state: str, reason: str | None) -> None: ...


class NullTracker:
    def log(self, line):
        pass

    def sync(self):
        pass

    def close(self, *, state, reason):
        pass


class Fan:
    def __init__(self, parts):
        self.parts = parts

    def log(self, line):
        for p in self.parts:
            p.log(line)

    def sync(self):
        for p in self.parts:
            getattr(p, "sync", lambda: None)()

    def close(self, *, state, reason):
        for p in self.parts:
            p.close(state=state, reason=reason)


def build_tracker(world: World, context: RunContext) -> Tracker:
    if not world.is_main:
        return NullTracker()
    return Fan([JsonlTracker(context), ConsoleTracker(context)])
