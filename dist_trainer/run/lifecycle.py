"""One attempt at a run, from joining the ranks to its exit code."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from dist_trainer.config.loading import dump_config
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.distributed.collectives import run_and_share_errors, run_on_rank0
from dist_trainer.distributed.context import DistributedContext, init_distributed
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import EXIT_FINISHED, CheckpointError, RefusedError, StoppedError, counted
from dist_trainer.run.build import build_trainer, check_entries
from dist_trainer.run.folder import RunFolder
from dist_trainer.run.memory import explain_out_of_memory
from dist_trainer.run.record import RunOutcome, RunRecord, exit_code_if_preempted
from dist_trainer.run.resume import ResumeState, resolve_resume
from dist_trainer.tracking.run_log import configure_logging
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)


def run(config: TrainingConfig, *, began: float | None = None, stop_request: StopRequest | None = None) -> int:
    """Train in the run's folder, from scratch or resumed; returns the exit code. Raises DistTrainerError, the same one on every
    rank.

    `began` (unix seconds; None: now): when the command started; its imports are part of the run's time. `stop_request`: the
    command's.
    """
    record = RunRecord(config, began=time.time() if began is None else began)

    def attempt(world: DistributedContext) -> int:
        with open_run_folder(config, world) as folder, record.attempt(folder, world):
            return train(config, world, record)

    return on_all_ranks(attempt, config, stop_request=stop_request, on_fatal=record.on_fatal)


def on_all_ranks(
    attempt: Callable[[DistributedContext], int],
    config: TrainingConfig,
    *,
    stop_request: StopRequest | None,
    on_fatal: Callable[[str], None] | None = None,
) -> int:
    """Join the ranks, check the config and run `attempt`; returns its result, or the exit code for a signal before training."""
    with (
        init_distributed(config.distributed, stop_request=stop_request, on_fatal=on_fatal) as world,
        world.stop_request.listen(),
    ):
        configure_logging(None, rank=world.rank)
        check_entries(config, world)
        try:
            return attempt(world)
        except StoppedError as stopped:
            log.warning("%s", stopped)
            return exit_code_if_preempted(world)
        finally:
            world.stop_request.mark_answered()


@contextmanager
def open_run_folder(config: TrainingConfig, world: DistributedContext) -> Generator[RunFolder | None]:
    """The run's folder, locked, on rank 0; None on other ranks. A new folder is kept only if something happened in it."""
    folder = run_and_share_errors(world, lambda: RunFolder(config.run_folder), acts=world.is_main)
    unused = True
    try:
        yield folder
    except Exception as error:
        unused = isinstance(error, RefusedError)  # after a crash the logs may say why
        raise
    finally:
        if folder is not None:
            configure_logging(None, rank=world.rank)
            folder.close(unused=unused)


def train(config: TrainingConfig, world: DistributedContext, record: RunRecord) -> int:
    """Build the run and train it; returns the exit code. Raises StoppedError if a signal arrives before training starts."""
    with explain_out_of_memory(config, world):
        trainer = prepare(config, world, record)
    if trainer.has_finished:
        log.info("%s", format_finished(trainer))
        record.mark_finished(trainer)
        return EXIT_FINISHED
    run_and_share_errors(world, lambda: _folder_of(record).write_config(dump_config(config)), acts=world.is_main)
    with explain_out_of_memory(config, world, trainer):
        outcome = RunOutcome.of_result(trainer.fit(), world)
    world.stop_request.mark_answered()  # before the outcome is recorded: a third signal would give another exit code
    record.finish(outcome)
    assert outcome.exit_code is not None, "known, since this process is alive"
    return outcome.exit_code


def prepare(config: TrainingConfig, world: DistributedContext, record: RunRecord) -> Trainer:
    """Find where to start, and build the run there."""
    logs = config.run_folder / "logs"

    def build(start: ResumeState) -> Trainer:
        if not start.replaces_run:
            configure_logging(logs, rank=world.rank)
        trainer = build_trainer(config, world, start, record)
        if start.replaces_run:  # only now, as the new run is valid: if it is rejected, the earlier one stays in place
            run_on_rank0(world, lambda: _folder_of(record).archive_run())
            configure_logging(logs, rank=world.rank)
        return trainer

    return build_where_found(world, find=lambda: resolve_resume(config, _folder_of(record)), build=build)


def build_where_found(
    world: DistributedContext, *, find: Callable[[], ResumeState], build: Callable[[ResumeState], Trainer]
) -> Trainer:
    """`build` from where rank 0 finds to start. If that checkpoint has been damaged or removed since, search again."""
    start = run_on_rank0(world, find)
    while True:
        try:
            check_visible(start, world)
            return build(start)
        except CheckpointError:
            refused, start = start, run_on_rank0(world, find)
            if start.checkpoint == refused.checkpoint:
                raise


def check_visible(start: ResumeState, world: DistributedContext) -> None:
    """Raises CheckpointError unless every rank sees the checkpoint: all machines must share its folder."""

    def check() -> None:
        if start.checkpoint is not None and not start.checkpoint.is_dir():
            raise CheckpointError(
                f"{start.checkpoint} is not visible on {socket.gethostname()} (rank {world.rank}): "
                "output_dir must be a folder that all machines share"
            )

    run_and_share_errors(world, check)


def format_finished(trainer: Trainer) -> str:
    """A message that nothing is left to do, with the remedy."""
    train, step, folder = trainer.config.train, trainer.progress.step, trainer.config.run_folder
    key = "max_steps" if train.epochs is None or train.max_steps is not None else "epochs"
    if step > trainer.max_steps:
        state = f"is already at step {step}, past train.{key} {getattr(train, key) or trainer.max_steps}"
    else:
        state = f"has already finished its {counted(step, 'step')}"
    return f"{folder} {state}; raise --train.{key} to continue, or choose another --run_name"


def _folder_of(record: RunRecord) -> RunFolder:
    assert record.folder is not None, "rank 0 has the run folder"
    return record.folder
