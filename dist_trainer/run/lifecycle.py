"""What a run leaves in its folder beside checkpoints: how it stands, how it began, and the truth of how it ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager

from dist_trainer.checkpoint.folders import step_folders
from dist_trainer.checkpoint.state import Progress
from dist_trainer.config.schema import DEFAULT_MAX_STEPS, TrainingConfig
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
    counted,
    signal_name,
)
from dist_trainer.html_report.page import write_report
from dist_trainer.run.folder import RunFolder
from dist_trainer.run.memory import explain_out_of_memory
from dist_trainer.run.record import RunOutcome, RunRecord, best_facts, run_context, write_ending
from dist_trainer.tracking.environment import describe_environment
from dist_trainer.tracking.events import append_event
from dist_trainer.tracking.goodput import goodput
from dist_trainer.tracking.run_reader import RunHistory, is_number, read_run, read_status
from dist_trainer.tracking.subprocess_tracker import is_wandb_behind
from dist_trainer.tracking.tracker import send_to_wandb
from dist_trainer.training.result import TrainingResult
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)


class CrashRecorder:
    """Records in the run's folder that this process is about to exit because its launcher or another rank is lost."""

    def __init__(self) -> None:
        self.record: Callable[[str], None] = lambda reason: None
        """Changes as the run becomes known."""

    def __call__(self, reason: str) -> None:
        """What the heartbeat calls before the process exits."""
        self.record(reason)


def train(trainer: Trainer, record: RunRecord | None, crash: CrashRecorder, *, began: float) -> TrainingResult:
    """Train, and leave the truth in the run's folder however it ends. `began` (unix seconds): when the command did."""
    crash.record = lambda reason: record_crash(trainer, reason, began=began)
    if record is None:
        return _train_beside_main(trainer, began=began)
    try:
        result = fit(trainer)
    except BaseException as error:
        code = exit_code_after(error)
        record.finish(trainer, state="failed", reason=reason_of(error, trainer.world), exit_code=code)
        raise
    if result.state == "finished":
        record.finish(trainer, state="finished", reason=result.reason, exit_code=EXIT_FINISHED)
    else:
        code = exit_code_when_preempted(trainer.world)
        record.finish(trainer, state="preempted", reason=signal_name(result.signal_number), exit_code=code)
    return result


def fit(trainer: Trainer) -> TrainingResult:
    """Train; if memory runs out, raise an error that has the numbers and what would help."""
    with explain_out_of_memory(trainer.config, trainer.world, trainer):
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
    progress, best = trainer.progress, best_facts(trainer.progress.best)
    write_ending(folder.path, ending, step=progress.step, max_steps=trainer.max_steps, spent=spent, **best)
    append_event(folder.path, "finished", step=trainer.progress.step, reason=None)
    try:
        write_report(RunHistory(folder.path))
    except Exception as error:
        log.warning("%s: its report could not be written (%s: %s)", folder.path, type(error).__name__, error)


def sync_to_wandb(trainer: Trainer, folder: RunFolder) -> None:
    """Bring a run that has finished to W&B's server, where it is online now and that has not had all of it."""
    if step_folders(folder.checkpoints) and is_wandb_behind(folder.path, trainer.config.tracking):
        send_to_wandb(run_context(trainer, folder, describe_environment(trainer.world)))


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
    write_ending(path, ending, **steps, is_last=is_last, **best_facts(progress.best))


def exit_code_when_preempted(world: DistributedContext) -> int:
    """75; as one of several ranks 0: launchers take anything else for a crash, and status.json tells the story."""
    return EXIT_PREEMPTED if world.world_size == 1 else EXIT_FINISHED
