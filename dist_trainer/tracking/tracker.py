"""Where a run's lines go: the table of sinks, and the one object that the trainer speaks to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from dist_trainer.config.secrets import masked_within
from dist_trainer.html_report.report_tracker import ReportTracker
from dist_trainer.tracking.console_tracker import ConsoleTracker
from dist_trainer.tracking.jsonl_tracker import JsonlTracker
from dist_trainer.tracking.run_context import RunContext
from dist_trainer.tracking.status import StatusTracker
from dist_trainer.tracking.subprocess_tracker import FOLLOWERS, SubprocessTracker, refuse_missing_packages

if TYPE_CHECKING:
    from dist_trainer.distributed.context import DistributedContext

__all__ = ["TRACKERS", "NullTracker", "RunContext", "Tracker", "build_tracker", "refuse_missing_packages"]

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes a run's lines, as they stand in metrics.jsonl."""

    def log(self, line: dict[str, Any]) -> None:
        """Take a line: {"kind": "train" | "validation" | "sample" | "profile", "step": ..., ...}. Costs microseconds."""

    def sync(self) -> None:
        """Return when what was logged survives a power cut; called before a checkpoint becomes visible, by the thread that
        writes it, while lines go on coming.
        """

    def close(self, *, state: str, reason: str | None) -> None:
        """The run ends: finished, preempted or failed, and why."""


# The first writes what the others read.
TRACKERS: dict[str, Callable[[RunContext], Tracker]] = {
    "jsonl": JsonlTracker,
    "console": ConsoleTracker,
    **{row: partial(SubprocessTracker, row=row) for row in FOLLOWERS},
    "report": ReportTracker,
    "status": StatusTracker,
}


class NullTracker:
    """Takes everything, does nothing: for ranks other than 0."""

    def log(self, line: dict[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self, *, state: str, reason: str | None) -> None:
        """Nothing."""


class FanOut:
    """Hands each line to every sink; what goes wrong in one costs a warning and touches neither training nor the others."""

    def __init__(self, sinks: Mapping[str, Tracker]) -> None:
        self._sinks = dict(sinks)
        self._warned: set[str] = set()

    def log(self, line: dict[str, Any]) -> None:
        """Hand on a line, with no secret in its texts: a prompt comes from the config."""
        line = masked_within(line)
        for name, sink in self._sinks.items():
            self._try(name, partial(sink.log, line))

    def sync(self) -> None:
        """Sync every sink."""
        for name, sink in self._sinks.items():
            self._try(name, sink.sync)

    def close(self, *, state: str, reason: str | None) -> None:
        """Close every sink, once."""
        sinks, self._sinks = self._sinks, {}
        for name, sink in sinks.items():
            if isinstance(sink, SubprocessTracker):
                self._try(name, partial(sink.ask_to_finish, state))
        for name, sink in sinks.items():
            self._try(name, partial(sink.close, state=state, reason=reason))

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except (Exception, SystemExit) as error:  # some libraries leave by sys.exit
            self._warn(name, error)

    def _warn(self, name: str, error: BaseException) -> None:
        if name not in self._warned:
            self._warned.add(name)
            log.warning("tracking: %s has trouble (%s: %s); training goes on", name, type(error).__name__, error)


def build_tracker(world: DistributedContext, context: RunContext) -> Tracker:
    """Every row of TRACKERS on rank 0, of the followers those that the config asks for; nothing on other ranks.

    A sink that cannot begin costs a warning.
    """
    if not world.is_main:
        return NullTracker()
    sinks: dict[str, Tracker] = {}
    for name, build in TRACKERS.items():
        if name in FOLLOWERS and not FOLLOWERS[name].is_on(context.config.tracking):
            continue
        try:
            sinks[name] = build(context)
        except (Exception, SystemExit) as error:
            log.warning("tracking: %s cannot begin (%s: %s); going on without it", name, type(error).__name__, error)
    return FanOut(sinks)
