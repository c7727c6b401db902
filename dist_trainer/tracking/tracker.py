"""Where a run's metrics go: the registry of trackers, and the object that training logs to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dist_trainer.config.schema import TrackingConfig
from dist_trainer.config.secrets import masked_within
from dist_trainer.tracking.console import ConsoleTracker
from dist_trainer.tracking.jsonl import JsonlTracker
from dist_trainer.tracking.status import StatusTracker
from dist_trainer.tracking.subprocess_tracker import EXPORTS, SubprocessTracker, describe_run

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl.

    May also have `sync()`, which returns when what was logged survives a power cut. It is called before a checkpoint becomes
    visible, by the thread that writes it, while more lines may be logged.
    """

    def log(self, line: dict[str, Any]) -> None:
        """Take a line: {"kind": "train" | "validation" | "sample" | "profile" | "digest", "step": ..., ...}. Costs
        microseconds. May be called by another thread, with lines of kind "digest".
        """

    def close(self, *, state: str, reason: str | None) -> None:
        """The run has ended: finished, preempted or failed, and why."""


@dataclass(frozen=True)
class RunContext:
    """What trackers may know about their run when training starts or resumes."""

    name: str
    folder: Path
    """OUTPUT_DIR/RUN_NAME."""
    tracking: TrackingConfig
    config: dict[str, Any]
    """The resolved config, nested, for W&B and others to show."""
    start_step: int
    """Finished optimizer steps: 0, or those of the checkpoint resumed from."""
    max_steps: int
    parameters: int
    """Number of trainable parameters."""
    environment: dict[str, Any] = field(default_factory=dict)
    """What `describe_environment` returns."""
    trains_on_conversations: bool = False
    can_open: Callable[[Path], bool] = lambda folder: False
    """Whether `generate` and `evaluate` can open the model in a run's folder."""


def export_tracker(run: RunContext, name: str) -> SubprocessTracker:
    """The tracker of the entry `name` of EXPORTS."""
    details = {"parameters": run.parameters, "max_steps": run.max_steps, "environment": run.environment}
    config = {**run.config, **details}
    return SubprocessTracker(describe_run(name, run.folder, run.tracking, run_name=run.name, config=config))


# The first entry writes the file that the others read.
TRACKERS: dict[str, Callable[[RunContext], Tracker]] = {
    "jsonl": lambda run: JsonlTracker(run.folder, run.start_step),
    "console": lambda run: ConsoleTracker(
        run.name,
        run.folder,
        start_step=run.start_step,
        max_steps=run.max_steps,
        trains_on_conversations=run.trains_on_conversations,
        can_open=run.can_open,
    ),
    **{name: partial(export_tracker, name=name) for name in EXPORTS},
    "status": lambda run: StatusTracker(run.folder, run.max_steps),
}


class TrackerList:
    """Passes each line to every tracker, if there are any; an error in one is logged as a warning and affects nothing else."""

    def __init__(self, trackers: Mapping[str, Tracker] | None = None) -> None:
        self._trackers = dict(trackers or {})
        self._warned: set[str] = set()

    def log(self, line: dict[str, Any]) -> None:
        """Pass on a line, with secrets in its texts masked: a prompt comes from the config."""
        line = masked_within(line)
        for name, tracker in self._trackers.items():
            self._try(name, partial(tracker.log, line))

    def sync(self) -> None:
        """Sync every tracker that can be synced."""
        for name, tracker in self._trackers.items():
            if (sync := getattr(tracker, "sync", None)) is not None:
                self._try(name, sync)

    def close(self, *, state: str, reason: str | None) -> None:
        """Close every tracker, once."""
        trackers, self._trackers = self._trackers, {}
        for name, tracker in trackers.items():
            if isinstance(tracker, SubprocessTracker):
                self._try(name, partial(tracker.ask_to_finish, state))
        for name, tracker in trackers.items():
            self._try(name, partial(tracker.close, state=state, reason=reason))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:  # some libraries call sys.exit
            if name not in self._warned:
                self._warned.add(name)
                log.warning("tracking: %s failed (%s: %s); training continues", name, type(error).__name__, error)


def build_tracker(run: RunContext, others: Mapping[str, Callable[[RunContext], Tracker]]) -> TrackerList:
    """Every entry of TRACKERS (of EXPORTS, only enabled ones) and of `others`; one that cannot start is a warning."""
    trackers: dict[str, Tracker] = {}
    for name, build in {**TRACKERS, **others}.items():
        if name in EXPORTS and not EXPORTS[name].is_enabled(run.tracking):
            continue
        try:
            trackers[name] = build(run)
        except (Exception, SystemExit) as error:
            log.warning("tracking: %s cannot start (%s: %s); continuing without it", name, type(error).__name__, error)
    return TrackerList(trackers)


def send_to_wandb(run: RunContext) -> None:
    """Send W&B's server what it lacks of a finished run; an error is logged as a warning."""
    try:
        export_tracker(run, "wandb").close(state="finished", reason=None)
    except Exception as error:
        log.warning("the rest of this run could not be sent to W&B (%s: %s)", type(error).__name__, error)
