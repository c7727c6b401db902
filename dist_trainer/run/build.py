"""The table of contents of a run: each part is built from its own section of the config and handed on."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_trainer.checkpoint.manager import CheckpointManager, Checkpoints, Export, NoCheckpoints
from dist_trainer.checkpoint.optimizer_state import check_is_savable
from dist_trainer.config.loading import as_dict, dump_config
from dist_trainer.config.paths import user_path
from dist_trainer.config.registry import resolve
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.build_datasets import fingerprints
from dist_trainer.data.build_loaders import Dataloaders, create_dataloaders
from dist_trainer.data.loader import varies_in_length
from dist_trainer.data.sampler import accumulation_steps
from dist_trainer.data.token_bytes import build_token_bytes
from dist_trainer.data.tokenizers import configured_tokenizer, vocabulary_size
from dist_trainer.distributed.collectives import local_rank0_first, run_and_share_errors, run_on_rank0
from dist_trainer.distributed.context import DistributedContext, init_distributed
from dist_trainer.distributed.launch_env import launcher_id
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import EXIT_FINISHED, CheckpointError, RefusedError, StoppedError
from dist_trainer.generation.samples import TextSamples, build_sample
from dist_trainer.huggingface.hub import is_hub_name
from dist_trainer.models.loss import check_model_takes_document_ids
from dist_trainer.models.registry import (
    MODELS,
    ModelContext,
    build_model,
    fetch_initial_model,
    make_weight_saver,
)
from dist_trainer.optim.registry import OPTIMIZERS, build_optimizer, resolve_optimizer_name
from dist_trainer.optim.schedules import (
    SCHEDULES,
    total_steps,
)
from dist_trainer.parallel.cpu.matmul import matmul_context
from dist_trainer.parallel.registry import STRATEGIES, parallelize
from dist_trainer.run.advice import warn_of_settings
from dist_trainer.run.folder import RunFolder
from dist_trainer.run.lifecycle import (
    CrashRecorder,
    exit_code_when_preempted,
    has_finished_in_words,
    mark_finished,
    record_startup_failure,
    sync_to_wandb,
    train,
)
from dist_trainer.run.memory import explain_out_of_memory
from dist_trainer.run.record import RunRecord, SaveNotes
from dist_trainer.run.resume import (
    ResumeState,
    check_same_data,
    resolve_resume,
)
from dist_trainer.tracking.run_log import configure_logging
from dist_trainer.tracking.subprocess_tracker import check_packages
from dist_trainer.training.precision import build_precision
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)


def run(
    config: TrainingConfig,
    *,
    began: float | None = None,
    stop_request: StopRequest | None = None,
) -> int:
    """A whole run; its exit code. Raises DistTrainerError, the same one on every rank.

    `began` (unix seconds; None: now) is when the command was entered: what it imported since belongs to the run's time.
    `stop_request`: the one that it began with.
    """
    began = time.time() if began is None else began
    crash = CrashRecorder()
    with (
        init_distributed(config.distributed, stop_request=stop_request, on_fatal=crash) as world,
        world.stop_request.listen(),
    ):
        configure_logging(None, rank=world.rank)
        refuse_what_cannot_run(config, world)
        try:
            with open_run_folder(config, world) as folder:
                return run_in(folder, config, world, crash, began=began)
        except StoppedError as stopped:
            log.warning("%s", stopped)
            return exit_code_when_preempted(world)
        finally:
            world.stop_request.mark_answered()


def refuse_what_cannot_run(config: TrainingConfig, world: DistributedContext) -> None:
    """Raises ConfigError, the same one on every rank, for what only ranks and imports can tell: now, not after hours of
    preparing data.
    """
    accumulation_steps(config.batch, world.world_size)
    run_and_share_errors(world, lambda: check_rows(config))
    run_and_share_errors(world, lambda: check_packages(config.tracking), acts=world.is_main)


def check_rows(config: TrainingConfig) -> None:
    """Raises ConfigError where a function of the user's own cannot be had."""
    resolve(MODELS, config.model.name, "model.name")
    if config.optim.name != "auto":
        resolve(OPTIMIZERS, config.optim.name, "optim.name")
    resolve(SCHEDULES, config.schedule.name, "schedule.name")
    if config.distributed.strategy != "auto":
        resolve(STRATEGIES, config.distributed.strategy, "distributed.strategy")


def run_in(
    folder: RunFolder | None, config: TrainingConfig, world: DistributedContext, crash: CrashRecorder, *, began: float
) -> int:
    """The run, in its locked folder. Raises StoppedError where a signal came before training could begin."""
    record = None if folder is None else RunRecord(folder, began=began)
    with record_startup_failure(folder, config, world, crash):
        with explain_out_of_memory(config, world):
            trainer = prepare(config, world, record)
        if trainer.has_finished:
            log.info("%s", has_finished_in_words(trainer))
            if folder is not None:
                mark_finished(trainer, folder)
                sync_to_wandb(trainer, folder)
            return EXIT_FINISHED
        run_and_share_errors(world, lambda: _owned(record).folder.write_config(dump_config(config)), acts=world.is_main)
    result = train(trainer, record, crash, began=began)
    return exit_code_when_preempted(world) if result.state == "preempted" else EXIT_FINISHED


def prepare(config: TrainingConfig, world: DistributedContext, record: RunRecord | None) -> Trainer:
    """Find where to begin, and build all parts of the run."""
    return build_with_fallback(
        world,
        find=lambda: resolve_resume(config, _owned(record).folder),
        build=lambda start: prepare_from(start, config, world, record),
    )


def build_with_fallback(
    world: DistributedContext, *, find: Callable[[], ResumeState], build: Callable[[ResumeState], Trainer]
) -> Trainer:
    """What `build` makes of what rank 0 finds, found once more where that is refused."""
    start = run_on_rank0(world, find)
    while True:
        try:
            return build(start)
        except CheckpointError:
            # What was intact a moment ago may have been damaged since, or be gone: then there is another one to go on from.
            refused, start = start, run_on_rank0(world, find)
            if start.checkpoint == refused.checkpoint:
                raise


def prepare_from(start: ResumeState, config: TrainingConfig, world: DistributedContext, record: RunRecord | None) -> Trainer:
    """All parts of the run, and its folder, made ready to go on from `start`."""
    check_visible_everywhere(start, world)
    logs = config.run_folder / "logs"
    if config.checkpoint.resume != "never" or start.checkpoint is not None:
        configure_logging(logs, rank=world.rank)
        return assemble(config, world, record, start)
    trainer = assemble(config, world, record, start)
    # Only now that the new run can begin: a refused one must leave the old one in its place.
    run_on_rank0(world, lambda: begin_anew(_owned(record).folder))
    configure_logging(logs, rank=world.rank)
    return trainer


def begin_anew(folder: RunFolder) -> None:
    """Set aside what an earlier run left."""
    folder.set_aside()


@contextmanager
def open_run_folder(config: TrainingConfig, world: DistributedContext) -> Generator[RunFolder | None]:
    """The run's folder, locked, on rank 0; None elsewhere. A new one stays only if something happened in it."""
    folder = run_and_share_errors(world, lambda: RunFolder(config.run_folder), acts=world.is_main)
    unused = True
    try:
        yield folder
    except Exception as error:
        unused = isinstance(error, RefusedError)  # what a crash left in the logs may tell why
        raise
    finally:
        if folder is not None:
            configure_logging(None, rank=world.rank)
            folder.close(unused=unused)


def assemble(config: TrainingConfig, world: DistributedContext, record: RunRecord | None, start: ResumeState) -> Trainer:
    """All parts of a run, standing where `start` says."""
    named = replace(config.data, tokenizer=tokenizer_name(config, start))
    tokenizer = local_rank0_first(world, lambda: configured_tokenizer(named))
    is_renamed = start.renamed_data(config)
    if is_renamed:  # another run's data must not be tokenised for hours before they are refused
        check_same_data(config, start, local_rank0_first(world, lambda: fingerprints(named, tokenizer)))
    loaders = create_dataloaders(config, world, tokenizer=tokenizer)
    found = data_fingerprints(loaders)
    if not is_renamed:
        check_same_data(config, start, found)
    if start.checkpoint is None and config.model.init_from is not None:
        local_rank0_first(world, lambda: fetch_initial_model(config.model))
    model = run_and_share_errors(world, lambda: build_model(config.model, model_context(config, world, tokenizer, start)))
    assert model is not None, "every rank builds one"
    if config.data.document_mask and config.data.packing:
        check_model_takes_document_ids(model)
    metadata = {"config": as_dict(config), "world_size": world.world_size, "launcher": launcher_id(), **found}
    checkpoints: Checkpoints = NoCheckpoints()
    if record is not None:
        export, folder = export_to(model, tokenizer), record.folder
        checkpoints = CheckpointManager(folder.checkpoints, config.checkpoint, export=export, saved=SaveNotes(folder.path))
    shown = (loaders.validation or loaders.train).dataset
    sample = run_and_share_errors(
        world,
        lambda: build_sample(config.tracking, config.data, tokenizer, model, shown, seed=config.seed),
        acts=world.is_main,
    )
    per_token, varying_length = flops_per_token(model, config), varies_in_length(loaders.train.dataset)
    precision = build_precision(config.precision, world.device)
    tokens = config.batch.global_batch_size * config.data.sequence_length
    optim = resolve_optimizer_name(config.optim, config.model, tokens_per_step=tokens)
    parallel_model = parallelize(
        model,
        world,
        strategy=config.distributed.strategy,
        compile=config.precision.compile,
        flops=flops_of_the_run(config, loaders, per_token),
        varying_length=varying_length,
    )
    trainer = Trainer(
        config,
        world,
        model=parallel_model,
        optimizer=build_optimizer(optim, model),
        train_data=loaders.train,
        validation_data=loaders.validation,
        precision=precision,
        step_context=matmul_context(
            model,
            device=world.device,
            dtype=precision.dtype,
            tokens=loaders.train.sampler.micro_batch_size * config.data.sequence_length,  # type: ignore[attr-defined]
            varying_length=varying_length,
        ),
        checkpoints=checkpoints,
        tracker=record,
        callbacks=[*filter(None, [record]), TextSamples(sample, config.tracking.sample_every_steps)],
        token_bytes=build_token_bytes(tokenizer),
        flops_per_token=per_token,
        metadata=metadata,
    )
    check_is_savable(trainer.optimizer, model)
    if start.checkpoint is not None:
        trainer.restore(start.checkpoint, start.progress)
    if world.is_main:
        warn_of_settings(config, trainer, start)
    return trainer


def tokenizer_name(config: TrainingConfig, start: ResumeState) -> str:
    """What names the run's tokenizer: of a run that goes on, its checkpoint, where the folder it was read from has gone."""
    name = config.data.tokenizer
    gone = name != "austen" and not is_hub_name(name) and not user_path(name).exists()
    return str(start.checkpoint) if gone and start.checkpoint is not None else name


def data_fingerprints(loaders: Dataloaders) -> dict[str, Any]:
    """What tells whether a run that goes on still reads, and validates on, the same text."""
    datasets = {"data_fingerprint": loaders.train.dataset}
    if loaders.validation is not None:
        datasets["validation_fingerprint"] = loaders.validation.dataset
    return {name: getattr(dataset, "fingerprint", None) for name, dataset in datasets.items()}


def model_context(config: TrainingConfig, world: DistributedContext, tokenizer: Any, start: ResumeState) -> ModelContext:
    """What the model must fit."""
    return ModelContext(
        vocabulary_size=vocabulary_size(tokenizer),
        sequence_length=config.data.sequence_length,
        seed=config.seed,
        device=world.device,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        resumed_from=start.checkpoint,
    )


def export_to(model: nn.Module, tokenizer: Any) -> Export:
    """Makes a folder usable by itself: weights in Hugging Face format, and the tokenizer beside them."""
    write_weights = make_weight_saver(model)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        write_weights(weights, folder)
        tokenizer.save_pretrained(folder)

    return export


def flops_per_token(model: nn.Module, config: TrainingConfig) -> float | None:
    """What the model says of itself; None where it does not."""
    count: Any = getattr(model, "flops_per_token", None)
    return count(config.data.sequence_length) if count is not None else None


def flops_of_the_run(config: TrainingConfig, loaders: Dataloaders, per_token: float | None) -> float | None:
    """Floating-point operations from the first step to the last, whether or not it is resumed in between."""
    if per_token is None:
        return None
    steps = total_steps(config.train, loaders.train.sampler.steps_per_epoch)  # type: ignore[attr-defined]
    return steps * config.batch.global_batch_size * config.data.sequence_length * per_token


def check_visible_everywhere(start: ResumeState, world: DistributedContext) -> None:
    """Every rank reads the checkpoint itself: its folder must be shared by all machines."""

    def look() -> None:
        if start.checkpoint is not None and not start.checkpoint.is_dir():
            raise CheckpointError(
                f"{start.checkpoint} is not visible on {socket.gethostname()} (rank {world.rank}): "
                "output_dir must be a folder that all machines share"
            )

    run_and_share_errors(world, look)


def _owned(record: RunRecord | None) -> RunRecord:
    assert record is not None, "rank 0 holds the run folder"
    return record
