"""`TRACKERS`: where the lines of a run go. Only rank 0 has any; a sink that fails costs a warning, never the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from dist_trainer.distributed.world import World
from dist_trainer.tracking.console_tracker import ConsoleTracker
from dist_trainer.tracking.jsonl_tracker import JsonlTracker
from dist_trainer.tracking.report_tracker import ReportTracker
from dist_trainer.tracking.run_context import RunContext
from dist_trainer.tracking.wandb_tracker import WandbTracker

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A sink for the lines of metrics.jsonl."""

    def log(self, line: dict[str, Any]) -> None:
        """Take a line; it has a `kind` and a `step`."""
        ...

    def sync(self) -> None:
        """Make durable what was logged; called before a checkpoint is taken."""
        ...

    def close(self, *, state: str, reason: str | None) -> None:
        """The run has ended: finished, preempted or failed."""
        ...


class NullTracker:
    """For ranks, and runs, that track nothing."""

    def log(self, line: dict[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self, *, state: str, reason: str | None) -> None:
        """Nothing."""


class FanOut:
    """Passes everything on to several trackers; one that fails is warned of once, and tried again with the next line."""

    def __init__(self, trackers: dict[str, Tracker]) -> None:
        self._trackers = trackers
        self._warned: set[str] = set()

    def log(self, line: dict[str, Any]) -> None:
        """To each."""
        self._each(lambda tracker: tracker.log(line))

    def sync(self) -> None:
        """Of each."""
        self._each(lambda tracker: tracker.sync())

    def close(self, *, state: str, reason: str | None) -> None:
        """Each."""
        self._each(lambda tracker: tracker.close(state=state, reason=reason))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                act(tracker)
            except Exception as error:  # a sink, be it one of the user's own, must not end a run
                if name not in self._warned:
                    self._warned.add(name)
                    log.warning("tracker %s failed (%s: %s); training goes on", name, type(error).__name__, error)


TRACKERS: dict[str, Callable[[RunContext], Tracker]] = {
    "jsonl": JsonlTracker,  # first: the others read what it has written
    "console": ConsoleTracker,
    "wandb": WandbTracker,
    "report": ReportTracker,
}


def build_tracker(world: World, context: RunContext) -> Tracker:
    """All TRACKERS on rank 0 (W&B unless tracking.wandb is disabled), none elsewhere."""
    if not world.is_main:
        return NullTracker()
    wanted = [name for name in TRACKERS if name != "wandb" or context.config.tracking.wandb != "disabled"]
    return FanOut({name: TRACKERS[name](context) for name in wanted})
