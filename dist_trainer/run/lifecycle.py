"""What a run leaves in its folder beside checkpoints: how it stands, how it began, and the truth of how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_trainer.checkpoint.folders import step_folders
from dist_trainer.checkpoint.state import Progress, Validated
from dist_trainer.config.loading import as_dict
from dist_trainer.config.schema import DEFAULT_MAX_STEPS, TrainingConfig
from dist_trainer.data.build_datasets import are_conversations
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.distributed.signals import signal_name
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
    counted,
)
from dist_trainer.html_report.page import ReportTracker, write_report
from dist_trainer.models.registry import can_open
from dist_trainer.run.folder import RunFolder
from dist_trainer.run.memory import explain_out_of_memory
from dist_trainer.run.summary import format_header
from dist_trainer.tracking.environment import describe_environment
from dist_trainer.tracking.events import FIRST_CHECKPOINT, StepCounter, append_event
from dist_trainer.tracking.goodput import Goodput, goodput, restarts_of, steps_to_redo
from dist_trainer.tracking.run_reader import RunHistory, is_number, read_events, read_run, read_status
from dist_trainer.tracking.status import State, amend_status, write_status
from dist_trainer.tracking.subprocess_tracker import is_wandb_behind
from dist_trainer.tracking.tracker import RunContext, build_tracker, send_to_wandb
from dist_trainer.training.profiler import profiled
from dist_trainer.training.trainer import Trainer, TrainingResult

log = logging.getLogger(__name__)


class CrashRecorder:
    """Records in the run's folder that this process is about to exit because its launcher or another rank is lost."""

    def __init__(self) -> None:
        self.record: Callable[[str], None] = lambda reason: None
        """Changes as the run becomes known."""

    def __call__(self, reason: str) -> None:
        """What the heartbeat calls before the process exits."""
        self.record(reason)


def train(trainer: Trainer, folder: RunFolder | None, crash: CrashRecorder, *, began: float) -> TrainingResult:
    """Train, and leave the truth in the run's folder however it ends. `began` (unix seconds): when the command did."""
    crash.record = lambda reason: record_crash(trainer, reason, began=began)
    if folder is None:
        return _train_beside_main(trainer, began=began)
    with closing(StepCounter(folder.path)) as counter:
        begin_run_folder(trainer, folder, counter, began=began)
        return _train_in(folder, trainer)


def _train_in(folder: RunFolder, trainer: Trainer) -> TrainingResult:
    try:
        result = fit(trainer)
    except BaseException as error:
        code = exit_code_after(error)
        finalize_run(trainer, folder, state="failed", reason=reason_of(error, trainer.world), exit_code=code)
        raise
    if result.state == "finished":
        finalize_run(trainer, folder, state="finished", reason=None, exit_code=EXIT_FINISHED)
    else:
        code = exit_code_when_preempted(trainer.world)
        reason = signal_name(result.signal_number)
        finalize_run(trainer, folder, state="preempted", reason=reason, exit_code=code)
    return result


def fit(trainer: Trainer) -> TrainingResult:
    """Train, with the steps recorded that profile.steps names; where memory runs out, with the numbers and what would help."""
    with explain_out_of_memory(trainer.config, trainer.world, trainer), profiled(trainer):
        return trainer.fit()


def _train_beside_main(trainer: Trainer, *, began: float) -> TrainingResult:
    """On ranks without the folder: where rank 0 is gone, another one must say so."""
    try:
        return fit(trainer)
    except DistTrainerError:  # which rank 0 has met too
        raise
    except Exception:
        if (lost := trainer.world.heartbeat.lost_peers()) and trainer.world.heartbeat.is_acting_rank0():
            record_crash(trainer, lost, began=began)
        raise


def exit_code_after(error: BaseException) -> int:
    """What the command exits with."""
    return error.exit_code if isinstance(error, DistTrainerError) else EXIT_CRASHED


def reason_of(error: BaseException, world: DistributedContext) -> str:
    """Why a run failed, in a sentence: of a broken connection who has broken it."""
    if isinstance(error, TrainingDivergedError):
        return f"diverged: {error}"
    if isinstance(error, OutOfMemoryError):
        return error.summary
    if isinstance(error, DistTrainerError):
        return str(error)
    return world.heartbeat.lost_peers() or f"{type(error).__name__}: {error}"


def begin_run_folder(trainer: Trainer, folder: RunFolder, counter: StepCounter, *, began: float) -> None:
    """From here on the folder is this run's: its status, its events, its steps, its trackers."""
    step = trainer.progress.step
    folder.is_new = False  # whatever comes: from now on it holds what must not be lost
    environment = describe_environment(trainer.world)  # takes a while: nothing has begun until then
    lost_steps = steps_to_redo(folder.path, start_step=step)
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    metadata = {"began": began, "lost_steps": lost_steps, "environment": environment, "parameters": parameters}
    append_event(folder.path, "resume" if step else "start", step=step, **metadata)
    counter.record(step)  # or the lost ones would be lost once more where this life comes to no step
    trainer.note_step = counter.record
    note_running(trainer, folder.path)
    log.info("%s", format_header(trainer, folder.path))
    trainer.tracker = build_tracker(_context(trainer, folder, environment), {"report": lambda run: ReportTracker(run.folder)})


def _context(trainer: Trainer, folder: RunFolder, environment: dict[str, Any]) -> RunContext:
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


def note_running(trainer: Trainer, folder: Path) -> None:
    """status.json of a run that lives, with what is known of its earlier lives."""
    restarts, lost_steps = restarts_of(folder)
    progress, past = trainer.progress, {"restarts": restarts, "lost_steps": lost_steps}
    best = _best_facts(progress.best)
    write_status(folder, "running", step=progress.step, max_steps=trainer.max_steps, **best, **past)


def _best_facts(best: Validated | None) -> dict[str, Any]:
    """For status.json, which names a best checkpoint only where there is one."""
    return {"best_step": None, "best_loss": None} if best is None else {"best_step": best.step, "best_loss": best.loss}


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
        amend_status(self._folder, checkpoint_seconds=write_seconds, **_best_facts(best))
        if not self._noted:
            self._noted = True
            append_event(self._folder, FIRST_CHECKPOINT, step=step, durable=True)


def finalize_run(trainer: Trainer, folder: RunFolder, *, state: State, reason: str | None, exit_code: int) -> None:
    """How it ended: for status.json, the events, and the trackers."""
    ending = RunOutcome(state, reason, exit_code)
    progress, best = trainer.progress, _best_facts(trainer.checkpoints.best(trainer.progress.best))
    write_ending(folder.path, ending, step=progress.step, max_steps=trainer.max_steps, **best)
    append_event(folder.path, state, step=trainer.progress.step, reason=reason)
    trainer.tracker.close(state=state, reason=reason)


def has_finished_in_words(trainer: Trainer) -> str:
    """That nothing is left to do, and what would change that."""
    config, step = trainer.config, trainer.progress.step
    path = config.run_folder
    if step > trainer.max_steps:
        done = f"has done {counted(step, 'step')}, more than the {trainer.max_steps} that it is to do now"
    else:
        done = f"has finished its {counted(step, 'step')} already"
    key = "--train.max_steps" if config.train.epochs is None or config.train.max_steps is not None else "--train.epochs"
    return f"{path} {done}; raise {key} to go on, or choose another --run_name"


def mark_finished(trainer: Trainer, folder: RunFolder) -> None:
    """A run that was killed between its last checkpoint and its last words has finished all the same: say so."""
    if not step_folders(folder.checkpoints):  # what has finished is another run, whose checkpoint was to be gone on from
        return
    history = read_run(folder.path)
    if history.status.get("state") == "finished":
        return
    # Its time ended with its last line: what came after was waiting for nothing.
    spent = goodput(history)
    ending = RunOutcome("finished", None, EXIT_FINISHED)
    progress, best = trainer.progress, _best_facts(trainer.progress.best)
    write_ending(folder.path, ending, step=progress.step, max_steps=trainer.max_steps, spent=spent, **best)
    append_event(folder.path, "finished", step=trainer.progress.step, reason=None)
    try:
        write_report(RunHistory(folder.path))
    except Exception as error:
        log.warning("%s: its report could not be written (%s: %s)", folder.path, type(error).__name__, error)


def sync_to_wandb(trainer: Trainer, folder: RunFolder) -> None:
    """Bring a run that has finished to W&B's server, where it is online now and that has not had all of it."""
    if step_folders(folder.checkpoints) and is_wandb_behind(folder.path, trainer.config.tracking):
        send_to_wandb(_context(trainer, folder, describe_environment(trainer.world)))


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


def record_crash(trainer: Trainer, reason: str, *, began: float) -> None:
    """This process, which `began` then, is about to end: the run has lost a rank, or its launcher.

    The first rank to say why knows best: what the others see is that it has left.
    """
    folder = trainer.config.run_folder
    status = read_status(folder)
    if status.get("state") == "failed" and is_number(status.get("time")) and status["time"] >= began:
        return
    ending = RunOutcome("failed", reason, EXIT_CRASHED)
    write_ending(folder, ending, step=trainer.progress.step, max_steps=trainer.max_steps, is_last=True)
    append_event(folder, "failed", step=trainer.progress.step, reason=reason)


# ------------------------------------------------------------------------------- lives that end before they train


@contextmanager
def record_startup_failure(
    folder: RunFolder | None, config: TrainingConfig, world: DistributedContext, crash: CrashRecorder
) -> Generator[None]:
    """What ends a life before it trains stands in status.json too, unless it is the status of a run that this is none of."""
    crash.record = lambda reason: note_early_end(folder, config, RunOutcome("failed", reason, EXIT_CRASHED), is_last=True)
    try:
        yield
    except BaseException as error:
        if isinstance(error, StoppedError):
            ending = RunOutcome("preempted", signal_name(error.signal_number), exit_code_when_preempted(world))
        else:
            ending = RunOutcome("failed", reason_of(error, world), exit_code_after(error))
        if folder is not None and not (folder.is_new and isinstance(error, RefusedError)):  # which is about to go
            folder.is_new = False
            is_anothers = isinstance(error, ConfigError | AnotherRunError)
            note_early_end(folder, config, ending, is_anothers=is_anothers)
        elif folder is None and world.heartbeat.is_acting_rank0():
            note_early_end(folder, config, ending)
        raise


def note_early_end(
    folder: RunFolder | None, config: TrainingConfig, ending: RunOutcome, *, is_anothers: bool = False, is_last: bool = False
) -> None:
    """Write `ending` of a life that has not trained; what it does not know stays as the life before it left it.

    `is_anothers`: what was refused is not the run that stands in the folder (or is to replace it), so that one's status
    stays. But `running` is never left: nobody runs it.
    """
    path = config.run_folder
    status = read_status(path)
    is_anothers |= config.checkpoint.resume == "never" if folder is None else folder.is_to_be_replaced
    if is_anothers and status.get("state") != "running":
        return
    if is_anothers:
        ending = RunOutcome("failed", f"it ended without a word; a start after that was refused: {ending.reason}", None)
    progress = folder.progress if folder is not None else None
    if progress is None:
        told = {key: status.get(key) if is_number(status.get(key)) else None for key in ("step", "best_step", "best_loss")}
        progress = Progress(int(told["step"] or 0), best_step=told["best_step"], best_loss=told["best_loss"])
    planned = DEFAULT_MAX_STEPS if config.train.epochs is None else status.get("max_steps")
    steps = {"step": progress.step, "max_steps": config.train.max_steps or planned}
    write_ending(path, ending, **steps, is_last=is_last, **_best_facts(progress.best))


def exit_code_when_preempted(world: DistributedContext) -> int:
    """75; as one of several ranks 0: launchers take anything else for a crash, and status.json tells the story."""
    return EXIT_PREEMPTED if world.world_size == 1 else EXIT_FINISHED
