"""What a run leaves in its folder beside checkpoints: how it stands, how it began, and the truth of how it ended."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from dist_trainer.checkpoint.manager import step_folders, step_of
from dist_trainer.checkpoint.run_folder import RunFolder
from dist_trainer.config.schema import DEFAULT_MAX_STEPS, TrainingConfig
from dist_trainer.distributed.preemption import signal_name
from dist_trainer.distributed.world import World
from dist_trainer.errors import DistTrainerError, OutOfMemoryError, StoppedError, TrainingDivergedError
from dist_trainer.exit_codes import EXIT_CRASHED, EXIT_FINISHED, EXIT_PREEMPTED
from dist_trainer.out_of_memory import explaining_out_of_memory
from dist_trainer.profiling.recorder import profiled
from dist_trainer.tracking.environment import describe_environment
from dist_trainer.tracking.events import append_event
from dist_trainer.tracking.goodput import Goodput, goodput, goodput_of, steps_to_redo
from dist_trainer.tracking.report_tracker import write_report
from dist_trainer.tracking.run_history import RunHistory, read_run
from dist_trainer.tracking.status import State, write_status
from dist_trainer.tracking.tracker import RunContext, build_tracker
from dist_trainer.trainer import Trainer, TrainingResult

log = logging.getLogger(__name__)


def train(trainer: Trainer, folder: RunFolder | None, *, began: float) -> TrainingResult:
    """Train, and leave the truth in the run's folder however it ends. `began` (unix seconds): when the command did."""
    trainer.world.heartbeat.last_words = lambda reason: note_sudden_end(trainer, reason)
    if folder is None:
        return fit(trainer)
    begin_run_folder(trainer, folder, began=began)
    try:
        result = fit(trainer)
    except BaseException as error:
        code = error.exit_code if isinstance(error, DistTrainerError) else EXIT_CRASHED
        end_run_folder(trainer, folder, state="failed", reason=reason_of(error, trainer.world), exit_code=code)
        raise
    if result.state == "finished":
        end_run_folder(trainer, folder, state="finished", reason=None, exit_code=EXIT_FINISHED)
    else:
        code = exit_code_when_preempted(trainer.world)
        reason = signal_name(result.signal_number)
        end_run_folder(trainer, folder, state="preempted", reason=reason, exit_code=code)
    return result


def fit(trainer: Trainer) -> TrainingResult:
    """Train, with the steps recorded that profile.steps names; where memory runs out, with the numbers and what would help."""
    with explaining_out_of_memory(trainer.config, trainer.world, trainer), profiled(trainer):
        return trainer.fit()


def reason_of(error: BaseException, world: World) -> str:
    """Why a run failed, in a sentence: of a broken connection who has broken it."""
    if isinstance(error, TrainingDivergedError):
        return f"diverged: {error}"
    if isinstance(error, OutOfMemoryError):
        return error.summary
    if isinstance(error, DistTrainerError):
        return str(error)
    return world.heartbeat.lost_peers() or f"{type(error).__name__}: {error}"


def begin_run_folder(trainer: Trainer, folder: RunFolder, *, began: float) -> None:
    """From here on the folder is this run's: its status, its events, its trackers."""
    config, step = trainer.config, trainer.progress.step
    folder.is_new = False  # whatever comes: from now on it holds what must not be lost
    write_status(folder.path, "running", step=step, max_steps=trainer.max_steps)
    environment = describe_environment(trainer.world)
    lost_steps = steps_to_redo(folder.path, start_step=step)
    facts = {"began": began, "lost_steps": lost_steps, "environment": environment}
    append_event(folder.path, "resume" if step else "start", step=step, **facts)
    context = RunContext(
        config=config,
        folder=folder.path,
        start_step=step,
        max_steps=trainer.max_steps,
        parameters=sum(parameter.numel() for parameter in trainer.parameters),
        environment=environment,
    )
    trainer.tracker = build_tracker(trainer.world, context)


def end_run_folder(trainer: Trainer, folder: RunFolder, *, state: State, reason: str | None, exit_code: int) -> None:
    """How it ended: for status.json, the events, and the trackers."""
    write_ending(trainer, folder.path, state=state, reason=reason, exit_code=exit_code)
    append_event(folder.path, state, step=trainer.progress.step, reason=reason)
    trainer.tracker.close(state=state, reason=reason)


def has_finished_in_words(trainer: Trainer) -> str:
    """That nothing is left to do, and what would change that."""
    config, step = trainer.config, trainer.progress.step
    path = Path(config.output_dir) / config.run_name
    if step > trainer.max_steps:
        done = f"has done {step} steps, more than the {trainer.max_steps} that it is to do now"
    else:
        done = f"has finished its {step} steps already"
    key = "--train.max_steps" if config.train.epochs is None or config.train.max_steps is not None else "--train.epochs"
    return f"{path} {done}; raise {key} to go on, or choose another --run_name"


def make_up_for_ending(trainer: Trainer, folder: RunFolder) -> None:
    """A run that was killed between its last checkpoint and its last words has finished all the same: say so."""
    if not step_folders(folder.checkpoints):  # what has finished is another run, whose checkpoint was to be gone on from
        return
    history = read_run(folder.path)
    if history.status.get("state") == "finished":
        return
    # Its time ended with its last line: what came after was waiting for nothing.
    spent = goodput(history)
    write_ending(trainer, folder.path, state="finished", reason=None, exit_code=EXIT_FINISHED, spent=spent)
    append_event(folder.path, "finished", step=trainer.progress.step, reason=None)
    try:
        write_report(RunHistory(folder.path))
    except OSError as error:
        log.warning("%s: its report could not be written: %s", folder.path, error.strerror)


def write_ending(
    trainer: Trainer, folder: Path, *, state: State, reason: str | None, exit_code: int, spent: Goodput | None = None
) -> None:
    """status.json, with the best loss and what the time went into (None: up to now)."""
    progress = trainer.progress
    spent = spent or goodput_of(folder, now=time.time())
    write_status(
        folder,
        state,
        step=progress.step,
        max_steps=trainer.max_steps,
        reason=reason,
        exit_code=exit_code,
        best_step=progress.best_step,
        best_loss=progress.best_loss,
        checkpoint_seconds=trainer.checkpoints.write_seconds,  # slurm/train.sh compares it with the time it is given
        restarts=spent.restarts,
        lost_steps=spent.lost_steps,
        useful_seconds=spent.useful_seconds,
        wall_seconds=spent.wall_seconds,
    )


def note_sudden_end(trainer: Trainer, reason: str) -> None:
    """This process is about to end, from another thread: the run has lost a rank, or its launcher."""
    folder = Path(trainer.config.output_dir) / trainer.config.run_name
    write_ending(trainer, folder, state="failed", reason=reason, exit_code=EXIT_CRASHED)
    append_event(folder, "failed", step=trainer.progress.step, reason=reason)


def note_early_stop(folder: RunFolder, config: TrainingConfig, stopped: StoppedError, *, exit_code: int) -> None:
    """A signal came while data were prepared: nothing is lost, and the run's folder says so."""
    folder.is_new = False
    saved = step_folders(folder.checkpoints)
    step = step_of(saved[0]) if saved else 0
    planned = DEFAULT_MAX_STEPS if config.train.epochs is None else None
    max_steps = config.train.max_steps or planned
    reason = signal_name(stopped.signal_number)
    write_status(folder.path, "preempted", step=step, max_steps=max_steps, reason=reason, exit_code=exit_code)


def exit_code_when_preempted(world: World) -> int:
    """75; as one of several ranks 0: launchers take anything else for a crash, and status.json tells the story."""
    return EXIT_PREEMPTED if world.world_size == 1 else EXIT_FINISHED
