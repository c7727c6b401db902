"""What rank 0 records of a run in its folder while it trains and when it ends: status, events, steps, trackers."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_trainer.checkpoint.state import Validated
from dist_trainer.config.loading import as_dict
from dist_trainer.data.loader import are_conversations
from dist_trainer.html_report.page import ReportTracker
from dist_trainer.models.registry import can_open
from dist_trainer.run.folder import RunFolder
from dist_trainer.run.summary import format_header
from dist_trainer.tracking.environment import describe_environment
from dist_trainer.tracking.events import FIRST_CHECKPOINT, StepCounter, append_event
from dist_trainer.tracking.goodput import Goodput, goodput, restarts_of, steps_to_redo
from dist_trainer.tracking.run_reader import read_events, read_run
from dist_trainer.tracking.status import State, amend_status, write_status
from dist_trainer.tracking.tracker import RunContext, Tracker, TrackerList, build_tracker
from dist_trainer.training.step import StepResult
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)


class RunRecord:
    """What rank 0 notes of a run in its folder: status, events, steps done, and the trackers' lines. A callback, and the
    trainer's tracker, which is opened when training begins.
    """

    def __init__(self, folder: RunFolder, *, began: float) -> None:
        """`began` (unix seconds): when the command did."""
        self.folder, self.began = folder, began
        self._tracker: Tracker = TrackerList()
        self._counter: StepCounter | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """From here on the folder is this run's."""
        step, path = trainer.progress.step, self.folder.path
        self.folder.is_new = False  # whatever comes: from now on it holds what must not be lost
        environment = describe_environment(trainer.world)  # takes a while: nothing has begun until then
        lost_steps = steps_to_redo(path, start_step=step)
        parameters = sum(parameter.numel() for parameter in trainer.parameters)
        metadata = {"began": self.began, "lost_steps": lost_steps, "environment": environment, "parameters": parameters}
        append_event(path, "resume" if step else "start", step=step, **metadata)
        self._counter = StepCounter(path)
        self._counter.record(step)  # or the lost ones would be lost once more where this life comes to no step
        note_running(trainer, path)
        log.info("%s", format_header(trainer, path))
        context = run_context(trainer, self.folder, environment)
        self._tracker = build_tracker(context, {"report": lambda run: ReportTracker(run.folder)})

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Count the step."""
        if self._counter is not None:
            self._counter.record(result.step)

    def log(self, line: dict[str, Any]) -> None:
        """Hand a line to all trackers."""
        self._tracker.log(line)

    def sync(self) -> None:
        """Return when all lines survive a power cut."""
        self._tracker.sync()

    def finish(self, trainer: Trainer, *, state: State, reason: str | None, exit_code: int) -> None:
        """How it ended: for status.json, the events, and the trackers."""
        if self._counter is not None:
            self._counter.close()
        path, ending = self.folder.path, RunOutcome(state, reason, exit_code)
        progress, best = trainer.progress, best_facts(trainer.checkpoints.best(trainer.progress.best))
        write_ending(path, ending, step=progress.step, max_steps=trainer.max_steps, **best)
        append_event(path, state, step=trainer.progress.step, reason=reason)
        self._tracker.close(state=state, reason=reason)


class SaveNotes:
    """Notes, outside of checkpoints/, that there are some: where all have gone, the next start must not begin anew."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._noted = any(event["event"] == FIRST_CHECKPOINT for event in read_events(folder))

    def __call__(self, step: int, write_seconds: float, best: Validated | None) -> None:
        """The checkpoint of `step` can be seen; the slowest one took `write_seconds`, and `best` is the best of those that are
        there. Called by the thread that writes.
        """
        # slurm/train.sh compares the seconds with the time it is given
        amend_status(self._folder, checkpoint_seconds=write_seconds, **best_facts(best))
        if not self._noted:
            self._noted = True
            append_event(self._folder, FIRST_CHECKPOINT, step=step, durable=True)


def note_running(trainer: Trainer, folder: Path) -> None:
    """status.json of a run that lives, with what is known of its earlier lives."""
    restarts, lost_steps = restarts_of(folder)
    progress, past = trainer.progress, {"restarts": restarts, "lost_steps": lost_steps}
    best = best_facts(progress.best)
    write_status(folder, "running", step=progress.step, max_steps=trainer.max_steps, **best, **past)


def run_context(trainer: Trainer, folder: RunFolder, environment: dict[str, Any]) -> RunContext:
    """What trackers are given of the run."""
    return RunContext(
        name=trainer.config.run_name,
        folder=folder.path,
        tracking=trainer.config.tracking,
        config=as_dict(trainer.config),
        start_step=trainer.progress.step,
        max_steps=trainer.max_steps,
        parameters=sum(parameter.numel() for parameter in trainer.parameters),
        environment=environment,
        trains_on_conversations=are_conversations(trainer.train_data.dataset),
        can_open=can_open,
    )


@dataclass(frozen=True)
class RunOutcome:
    """How a life of a run ended."""

    state: State
    reason: str | None
    exit_code: int | None
    """None: nobody knows."""


def write_ending(
    folder: Path,
    ending: RunOutcome,
    *,
    step: int,
    max_steps: int | None,
    spent: Goodput | None = None,
    is_last: bool = False,
    **best: Any,
) -> None:
    """status.json, with what the time went into (None: up to now); without `best` that stays as it was last noted."""
    spent = spent or goodput(read_run(folder), now=time.time())
    write_status(
        folder,
        ending.state,
        step=step,
        max_steps=max_steps,
        is_last=is_last,
        reason=ending.reason,
        exit_code=ending.exit_code,
        **best,
        restarts=spent.restarts,
        lost_steps=spent.lost_steps,
        useful_seconds=spent.useful_seconds,
        wall_seconds=spent.wall_seconds,
    )


def best_facts(best: Validated | None) -> dict[str, Any]:
    """For status.json, which names a best checkpoint only where there is one."""
    return {"best_step": None, "best_loss": None} if best is None else {"best_step": best.step, "best_loss": best.loss}
