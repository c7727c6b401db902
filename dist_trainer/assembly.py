"""The table of contents of a run: each part is built from its own section of the config and handed on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dist_trainer.checkpoint.manager import CheckpointManager, Export, NoCheckpoints
from dist_trainer.checkpoint.run_folder import RunFolder
from dist_trainer.checkpoint.state import Snapshot, restore_optimizer
from dist_trainer.config.loading import as_dict, dump_config
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.loader import create_dataloaders
from dist_trainer.data.sampler import accumulation_steps
from dist_trainer.data.tokenization import load_tokenizer
from dist_trainer.distributed.collectives import agree, first_on_each_node, on_main
from dist_trainer.distributed.preemption import StopRequest, signal_name
from dist_trainer.distributed.world import World
from dist_trainer.errors import CheckpointError, DistTrainerError, RefusedError
from dist_trainer.models.registry import ModelContext, build_model, load_weights, weights_writer
from dist_trainer.optim.optimizers import build_optimizer
from dist_trainer.parallel.registry import parallelize
from dist_trainer.precision import build_precision
from dist_trainer.sampling import Sample, build_sample
from dist_trainer.starting_point import StartingPoint, find_starting_point
from dist_trainer.tracking.console_tracker import configure_logging
from dist_trainer.tracking.environment import describe_environment
from dist_trainer.tracking.events import append_event
from dist_trainer.tracking.tracker import RunContext, build_tracker
from dist_trainer.trainer import Trainer, TrainingResult

log = logging.getLogger(__name__)

EXIT_FINISHED = 0
EXIT_PREEMPTED = 75


def run(config: TrainingConfig) -> int:
    """A whole run; its exit code. Raises DistTrainerError, the same one on every rank."""
    with World.join(config.distributed) as world:
        configure_logging(None, rank=world.rank)
        accumulation_steps(config.batch, world.world_size)
        with open_run_folder(config, world) as folder:
            start = on_main(world, lambda: find_starting_point(config, _owned(folder)))
            check_visible_everywhere(start, world)
            trainer = assemble(config, world, folder, start)
            if trainer.progress.step >= trainer.max_steps:
                log.info(
                    "%s has finished its %d steps already; raise --train.max_steps to go on, or choose another --run_name",
                    *(Path(config.output_dir) / config.run_name, trainer.progress.step),
                )
                return EXIT_FINISHED
            result = train(trainer, folder)
        if result.state == "preempted" and world.world_size == 1:
            return EXIT_PREEMPTED
        # As one of several ranks: launchers take anything but 0 for a crash; status.json tells the story.
        return EXIT_FINISHED


@contextmanager
def open_run_folder(config: TrainingConfig, world: World) -> Iterator[RunFolder | None]:
    """The run's folder, locked, on rank 0; None elsewhere. A refused run leaves no new folder behind."""
    path = Path(config.output_dir) / config.run_name
    folder = agree(world, lambda: RunFolder(path), acts=world.is_main)
    refused = False
    try:
        yield folder
    except RefusedError:
        refused = True
        raise
    finally:
        if folder is not None:
            configure_logging(None, rank=world.rank)
            folder.close(refused=refused)


def assemble(config: TrainingConfig, world: World, folder: RunFolder | None, start: StartingPoint) -> Trainer:
    """All parts of a run, standing where `start` says."""
    tokenizer = first_on_each_node(world, lambda: load_tokenizer(config.data.tokenizer))
    loaders = create_dataloaders(config, world, tokenizer=tokenizer)
    fingerprint = getattr(loaders.train.dataset, "fingerprint", None)
    if start.data_fingerprint not in (None, fingerprint):
        raise CheckpointError(
            f"data.dataset: {config.data.dataset} holds other text now than when the run in {start.checkpoint} began; "
            "bring the old text back, choose another --run_name, or begin anew with --checkpoint.resume never"
        )

    model = build_model(config.model, model_context(config, world, tokenizer, initialise=start.checkpoint is None))
    optimizer = build_optimizer(config.optim, model)
    precision = build_precision(config.precision, world.device)
    if start.checkpoint is not None:
        load_weights(model, start.checkpoint)
        restore_optimizer(optimizer, model, start.checkpoint)
        precision.load_state_dict(start.scaler)

    facts = {"config": as_dict(config), "world_size": world.world_size, "data_fingerprint": fingerprint}
    checkpoints = NoCheckpoints()
    sample = None
    if folder is not None:
        checkpoints = CheckpointManager(folder.checkpoints, config.checkpoint, export=export_to(model, tokenizer))
        sample = sample_of(config, tokenizer, loaders.validation)
    trainer = Trainer(
        config,
        world,
        model=parallelize(model, world, distributed=config.distributed, precision=config.precision),
        optimizer=optimizer,
        train_data=loaders.train,
        validation_data=loaders.validation,
        precision=precision,
        checkpoints=checkpoints,
        sample=sample,
        stop_request=StopRequest(),
        flops_per_token=flops_per_token(model, config),
        facts=facts,
    )
    trainer.progress = start.progress
    return trainer
