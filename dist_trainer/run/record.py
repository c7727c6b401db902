"""What an attempt records in its run's folder: status.json, events, progress, the trackers' files, and how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dist_trainer.checkpoint.folders import step_folders
from dist_trainer.checkpoint.state import Progress, Validated
from dist_trainer.config.loading import as_dict
from dist_trainer.config.schema import DEFAULT_MAX_STEPS, TrainingConfig
from dist_trainer.data.loader import are_conversations
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import (
    EXIT_CRASHED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    AnotherRunError,
    ConfigError,
    DistTrainerError,
    OutOfMemoryError,
    RefusedError,
    StoppedError,
    TrainingDivergedError,
    signal_name,
)
from dist_trainer.html_report.page import ReportTracker, write_report
from dist_trainer.models.weights import can_open
from dist_trainer.run.folder import RunFolder
from dist_trainer.run.summary import format_header
from dist_trainer.tracking.environment import describe_environment
from dist_trainer.tracking.goodput import Goodput, goodput, restarts_of, steps_to_redo
from dist_trainer.tracking.run_reader import RunHistory, is_number, number, read_run, read_status
from dist_trainer.tracking.status import (
    FIRST_CHECKPOINT,
    State,
    StepCounter,
    amend_status,
    append_event,
    has_saved,
    write_status,
)
from dist_trainer.tracking.subprocess_tracker import is_wandb_behind
from dist_trainer.tracking.tracker import RunContext, TrackerList, build_tracker, send_to_wandb
from dist_trainer.training.saving import TrainingResult
from dist_trainer.training.step import StepResult
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOutcome:
    """How an attempt ended; determines status.json, events and the exit code."""

    state: State
    reason: str | None = None
    exit_code: int | None = EXIT_FINISHED
    """None: unknown."""

    @staticmethod
    def of_result(result: TrainingResult, world: DistributedContext) -> RunOutcome:
        """The outcome of training that ended without an error."""
        if result.state == "finished":
            return RunOutcome("finished", result.reason)
        return RunOutcome("preempted", signal_name(result.signal_number), exit_code_if_preempted(world))

    @staticmethod
    def of_error(error: BaseException, world: DistributedContext) -> RunOutcome:
        """The outcome of an error. The reason is one sentence; for a broken connection it names the lost rank."""
        if isinstance(error, StoppedError):
            return RunOutcome("preempted", signal_name(error.signal_number), exit_code_if_preempted(world))
        if not isinstance(error, DistTrainerError):
            reason = world.heartbeat.lost_peers() or f"{type(error).__name__}: {error}"
            return RunOutcome("failed", reason, EXIT_CRASHED)
        reason = error.summary if isinstance(error, OutOfMemoryError) else str(error)
        diverged = "diverged: " if isinstance(error, TrainingDivergedError) else ""
        return RunOutcome("failed", f"{diverged}{reason}", error.exit_code)


def exit_code_if_preempted(world: DistributedContext) -> int:
    """75; with several ranks 0, because launchers treat anything else as a crash. status.json has the real outcome."""
    return EXIT_PREEMPTED if world.world_size == 1 else EXIT_FINISHED


class RunRecord:
    """Records one attempt in the run's folder, whatever happens: the heartbeat's `on_fatal`, the trainer's tracker, a callback.

    Created before the ranks join. Rank 0, which has locked the folder, writes; if it is lost, another rank does.
    """

    def __init__(self, config: TrainingConfig, *, began: float) -> None:
        """`began` (unix seconds): when the command started."""
        self._config, self._path, self._began = config, config.run_folder, began
        self.folder: RunFolder | None = None
        """Set on rank 0, once it is locked."""
        self._is_open = False
        self._trainer: Trainer | None = None
        """None: training has not started."""
        self._counter: StepCounter | None = None
        self._tracker = TrackerList()
        self._has_saved = False

    @contextmanager
    def attempt(self, folder: RunFolder | None, world: DistributedContext) -> Generator[None]:
        """Record the error or signal that ends the code inside. `folder`: locked, on rank 0; None on other ranks."""
        self.folder, self._is_open = folder, True
        try:
            yield
        except BaseException as error:
            outcome = RunOutcome.of_error(error, world)
            if folder is not None:
                self._record_error(error, outcome, folder)
            elif world.heartbeat.is_acting_rank0():
                if self._trainer is None:
                    self._write_unstarted(outcome)
                elif not isinstance(error, DistTrainerError) and world.heartbeat.lost_peers():
                    self._write_crash(outcome)
            raise

    def _record_error(self, error: BaseException, outcome: RunOutcome, folder: RunFolder) -> None:
        if self._trainer is not None:
            self.finish(outcome)
        elif not (folder.is_new and isinstance(error, RefusedError)):  # otherwise the folder is about to be removed
            folder.is_new = False
            self._write_unstarted(outcome, is_anothers=isinstance(error, ConfigError | AnotherRunError))

    def on_fatal(self, reason: str) -> None:
        """This process is about to exit, because another rank or the launcher is lost."""
        outcome = RunOutcome("failed", reason, EXIT_CRASHED)
        if self._trainer is not None:
            self._write_crash(outcome)
        elif self._is_open:
            self._write_unstarted(outcome, is_last=True)

    # -------------------------------------------------------------------------------- while it trains

    def on_fit_start(self, trainer: Trainer) -> None:
        """From here on the folder belongs to this run: its status, events, progress and trackers."""
        self._trainer, folder, path, step = trainer, self.folder, self._path, trainer.progress.step
        if folder is None:
            return
        folder.is_new = False  # from now on its content must not be lost
        run = self._context(trainer)  # takes a while; nothing has started before
        lost_steps = steps_to_redo(path, start_step=step)
        metadata = {"lost_steps": lost_steps, "environment": run.environment, "parameters": run.parameters}
        append_event(path, "resume" if step else "start", step=step, began=self._began, **metadata)
        self._has_saved = has_saved(path)
        self._counter = StepCounter(path)
        self._counter.record(step)  # or the lost steps would be counted again if this attempt ends before its first step
        restarts, lost_steps = restarts_of(path)
        past: dict[str, Any] = {"restarts": restarts, "lost_steps": lost_steps, **_best(trainer.progress.best)}
        if number(read_status(path).get("digest_step")) > step:  # of a lost step
            past |= {"digest": None, "digest_step": None}
        write_status(path, "running", step=step, max_steps=trainer.max_steps, **past)
        log.info("%s", format_header(trainer, path))
        self._tracker = build_tracker(run, {"report": lambda run: ReportTracker(run.folder)})

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Count the step."""
        if self._counter is not None:
            self._counter.record(result.step)

    def on_saved(self, step: int, write_seconds: float, best: Validated | None, digest: str | None) -> None:
        """The checkpoint of `step` is visible; the slowest write took `write_seconds`. Called by the thread that writes.

        Recorded outside checkpoints/: if all of them are lost, the next attempt must not start over.
        """
        amend_status(self._path, digest=digest, digest_step=step, **_best(best))
        amend_status(self._path, checkpoint_seconds=write_seconds)  # slurm/train.sh reads it
        if not self._has_saved:
            self._has_saved = True
            append_event(self._path, FIRST_CHECKPOINT, step=step, durable=True)

    def log(self, line: dict[str, Any]) -> None:
        """Pass a line to all trackers."""
        self._tracker.log(line)

    def sync(self) -> None:
        """Return when the lines so far survive a power cut."""
        self._tracker.sync()

    # -------------------------------------------------------------------------------- how it ended

    def finish(self, outcome: RunOutcome) -> None:
        """Record the outcome of training, and close the trackers."""
        trainer = self._trainer
        if self.folder is None or trainer is None:
            return
        best = trainer.checkpoints.best(trainer.progress.best)
        self._write(outcome, step=trainer.progress.step, max_steps=trainer.max_steps, **_best(best))
        append_event(self._path, outcome.state, step=trainer.progress.step, reason=outcome.reason)
        self._tracker.close(state=outcome.state, reason=outcome.reason)
        if self._counter is not None:
            self._counter.close()

    def mark_finished(self, trainer: Trainer) -> None:
        """Nothing was left to do. Record that, if the previous attempt was killed before it could; send W&B what it lacks."""
        if self.folder is None or not step_folders(self.folder.checkpoints):  # then another run, resumed from, has finished
            return
        history, progress = read_run(self._path), trainer.progress
        if history.status.get("state") != "finished":
            spent = goodput(history)  # until its last line: no time was spent after that
            best = _best(progress.best)
            self._write(RunOutcome("finished"), step=progress.step, max_steps=trainer.max_steps, spent=spent, **best)
            append_event(self._path, "finished", step=progress.step, reason=None)
            try:
                write_report(RunHistory(self._path))
            except Exception as error:
                log.warning("%s: its report could not be written (%s: %s)", self._path, type(error).__name__, error)
        if is_wandb_behind(self._path, self._config.tracking):
            send_to_wandb(self._context(trainer))

    def _write_unstarted(self, outcome: RunOutcome, *, is_anothers: bool = False, is_last: bool = False) -> None:
        """Write the outcome of an attempt that did not train; values it does not know stay unchanged.

        `is_anothers`: the run in the folder is not the rejected one (or would have been replaced by it), so its status stays,
        unless that is `running`, which is no longer true.
        """
        folder, status = self.folder, read_status(self._path)
        is_anothers |= self._config.checkpoint.resume == "never" if folder is None else folder.is_to_be_archived
        if is_anothers:
            if status.get("state") != "running":
                return
            outcome = RunOutcome("failed", f"killed without a message; a later start was refused: {outcome.reason}", None)
        progress = folder.progress if folder is not None else None
        if progress is None:
            step, best_step, best_loss = (
                status.get(key) if is_number(status.get(key)) else None for key in ("step", "best_step", "best_loss")
            )
            progress = Progress(int(step or 0), best_step=best_step, best_loss=best_loss)
        train = self._config.train
        planned = DEFAULT_MAX_STEPS if train.epochs is None else status.get("max_steps")
        max_steps = train.max_steps or planned
        self._write(outcome, step=progress.step, max_steps=max_steps, is_last=is_last, **_best(progress.best))

    def _write_crash(self, outcome: RunOutcome) -> None:
        """A rank or the launcher is lost. Only the first rank to notice knows why; the others only see that it has exited."""
        status, trainer = read_status(self._path), self._trainer
        assert trainer is not None, "it trains"
        if status.get("state") == "failed" and is_number(status.get("time")) and status["time"] >= self._began:
            return
        self._write(outcome, step=trainer.progress.step, max_steps=trainer.max_steps, is_last=True)
        append_event(self._path, outcome.state, step=trainer.progress.step, reason=outcome.reason)

    def _write(
        self,
        outcome: RunOutcome,
        *,
        step: int,
        max_steps: int | None,
        spent: Goodput | None = None,
        is_last: bool = False,
        **best: Any,
    ) -> None:
        """status.json, with how the time was spent (None: until now); without `best`, that keeps its last value."""
        spent = spent or goodput(read_run(self._path), now=time.time())
        write_status(
            self._path,
            outcome.state,
            step=step,
            max_steps=max_steps,
            is_last=is_last,
            reason=outcome.reason,
            exit_code=outcome.exit_code,
            **best,
            restarts=spent.restarts,
            lost_steps=spent.lost_steps,
            useful_seconds=spent.useful_seconds,
            wall_seconds=spent.wall_seconds,
        )

    def _context(self, trainer: Trainer) -> RunContext:
        return RunContext(
            name=self._config.run_name,
            folder=self._path,
            tracking=self._config.tracking,
            config=as_dict(self._config),
            start_step=trainer.progress.step,
            max_steps=trainer.max_steps,
            parameters=sum(parameter.numel() for parameter in trainer.parameters),
            environment=describe_environment(trainer.world),
            trains_on_conversations=are_conversations(trainer.train_data.dataset),
            can_open=can_open,
        )


def _best(best: Validated | None) -> dict[str, Any]:
    """The fields of status.json for the best checkpoint, if there is one."""
    return {"best_step": None, "best_loss": None} if best is None else {"best_step": best.step, "best_loss": best.loss}
