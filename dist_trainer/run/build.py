"""The table of contents of a run: builds each part from its section of the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_trainer.checkpoint.manager import CheckpointManager, Checkpoints, SaveModel
from dist_trainer.checkpoint.optimizer_state import check_is_savable
from dist_trainer.config.loading import as_dict
from dist_trainer.config.paths import user_path
from dist_trainer.config.registry import resolve
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.build_datasets import fingerprints
from dist_trainer.data.loader import Dataloaders, create_dataloaders, varies_in_length
from dist_trainer.data.sampler import accumulation_steps
from dist_trainer.data.token_bytes import build_token_bytes
from dist_trainer.data.tokenizers import configured_tokenizer, vocabulary_size
from dist_trainer.distributed.collectives import local_rank0_first, run_and_share_errors
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.distributed.launch_env import launcher_id
from dist_trainer.generation.samples import TextSamples, build_sample
from dist_trainer.huggingface.hub import is_hub_name
from dist_trainer.models.loss import check_model_takes_document_ids
from dist_trainer.models.registry import MODELS, ModelContext, build_model, fetch_initial_model
from dist_trainer.models.weights import make_weight_saver
from dist_trainer.optim.registry import OPTIMIZERS, build_optimizer, resolve_optimizer_name
from dist_trainer.optim.schedules import SCHEDULES, total_steps
from dist_trainer.parallel.cpu.matmul import matmul_context
from dist_trainer.parallel.reduction import REDUCTIONS, reduction_name
from dist_trainer.parallel.registry import STRATEGIES, parallelize
from dist_trainer.run.record import RunRecord
from dist_trainer.run.resume import ResumeState, check_same_data
from dist_trainer.run.summary import warn_of_settings
from dist_trainer.tracking.subprocess_tracker import check_packages
from dist_trainer.training.callbacks import build_callbacks
from dist_trainer.training.digests import WeightDigests
from dist_trainer.training.precision import build_precision
from dist_trainer.training.sentinel import check_has_second_rank
from dist_trainer.training.trainer import Trainer


def check_entries(config: TrainingConfig, world: DistributedContext) -> None:
    """Raises ConfigError, the same one on every rank, for what only ranks or imports reveal, before data are prepared."""
    accumulation_steps(config.batch, world.world_size)
    check_has_second_rank(config.distributed, world)
    run_and_share_errors(world, lambda: check_registry_names(config))
    run_and_share_errors(world, lambda: check_packages(config.tracking), acts=world.is_main)


def check_registry_names(config: TrainingConfig) -> None:
    """Raises ConfigError if a user's function cannot be imported."""
    resolve(MODELS, config.model.name, "model.name")
    if config.optim.name != "auto":
        resolve(OPTIMIZERS, config.optim.name, "optim.name")
    resolve(SCHEDULES, config.schedule.name, "schedule.name")
    if config.distributed.strategy != "auto":
        resolve(STRATEGIES, config.distributed.strategy, "distributed.strategy")
    resolve(REDUCTIONS, config.distributed.reduction, "distributed.reduction")
    for name in config.train.callbacks:
        resolve({}, name, "train.callbacks")


def build_trainer(
    config: TrainingConfig,
    world: DistributedContext,
    start: ResumeState,
    record: RunRecord | None = None,
    *,
    callbacks: Sequence[object] = (),
) -> Trainer:
    """All parts of a run, at `start`. Without a `record`, nothing is saved or recorded. `callbacks`: added to the config's."""
    own_callbacks = run_and_share_errors(world, lambda: build_callbacks(config)) or []
    tokenizer = load_tokenizer(config, world, start)
    loaders, data_fingerprints = load_data(config, world, start, tokenizer)
    model = load_model(config, world, start, tokenizer)
    precision = build_precision(config.precision, world.device)
    varying_length, per_token = varies_in_length(loaders.train.dataset), flops_per_token(model, config)
    tokens = config.batch.global_batch_size * config.data.sequence_length
    optim = resolve_optimizer_name(config.optim, config.model, tokens_per_step=tokens)
    shown = (loaders.validation or loaders.train).dataset
    sample = run_and_share_errors(
        world,
        lambda: build_sample(config.tracking, config.data, tokenizer, model, shown, seed=config.seed),
        acts=world.is_main,
    )
    parallel_model = parallelize(
        model,
        world,
        strategy=config.distributed.strategy,
        compile=config.precision.compile,
        flops=flops_of_run(config, loaders, per_token),
        varying_length=varying_length,
    )
    every = config.tracking.digest_every_steps
    digests = WeightDigests(every, model, record) if every and record is not None else None
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
        checkpoints=build_checkpoints(config, model, tokenizer, record),
        tracker=digests or record,
        callbacks=[
            *filter(None, [record, digests]),
            *callbacks,
            TextSamples(sample, config.tracking.sample_every_steps),
            *own_callbacks,
        ],
        token_bytes=build_token_bytes(tokenizer),
        flops_per_token=per_token,
        metadata={
            "config": as_dict(config),
            "world_size": world.world_size,
            "micro_batch_size": loaders.train.sampler.micro_batch_size,  # type: ignore[attr-defined]
            "reduction": reduction_name(config.distributed.reduction, parallel_model, world),
            "launcher": launcher_id(),
            **data_fingerprints,
        },
    )
    check_is_savable(trainer.optimizer, model)
    if start.checkpoint is not None:
        trainer.restore(start.checkpoint, start.progress)
    if world.is_main:
        warn_of_settings(config, trainer, start)
    return trainer


def load_tokenizer(config: TrainingConfig, world: DistributedContext, start: ResumeState) -> Any:
    """The tokenizer of data.tokenizer; a resumed run takes it from its checkpoint if the original folder is gone."""
    name = config.data.tokenizer
    is_gone = name != "austen" and not is_hub_name(name) and not user_path(name).exists()
    section = replace(config.data, tokenizer=str(start.checkpoint)) if is_gone and start.checkpoint else config.data
    return local_rank0_first(world, lambda: configured_tokenizer(section))


def load_data(
    config: TrainingConfig, world: DistributedContext, start: ResumeState, tokenizer: Any
) -> tuple[Dataloaders, dict[str, Any]]:
    """The loaders, and the fingerprints by which a resumed run recognises its text. Raises AnotherRunError if it differs."""
    is_renamed = start.renamed_data(config)
    if is_renamed:  # check first: another run's data must not be tokenised for hours before they are rejected
        check_same_data(config, start, local_rank0_first(world, lambda: fingerprints(config.data, tokenizer)))
    loaders = create_dataloaders(config, world, tokenizer=tokenizer)
    datasets = {"data_fingerprint": loaders.train.dataset}
    if loaders.validation is not None:
        datasets["validation_fingerprint"] = loaders.validation.dataset
    found = {name: getattr(dataset, "fingerprint", None) for name, dataset in datasets.items()}
    if not is_renamed:
        check_same_data(config, start, found)
    return loaders, found


def load_model(config: TrainingConfig, world: DistributedContext, start: ResumeState, tokenizer: Any) -> nn.Module:
    """The model that fits the tokenizer and the sequences, on this rank's device."""
    if start.checkpoint is None and config.model.init_from is not None:
        local_rank0_first(world, lambda: fetch_initial_model(config.model))
    context = ModelContext(
        vocabulary_size=vocabulary_size(tokenizer),
        sequence_length=config.data.sequence_length,
        seed=config.seed,
        device=world.device,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        resumed_from=start.checkpoint,
    )
    model = run_and_share_errors(world, lambda: build_model(config.model, context))
    assert model is not None, "every rank builds one"
    if config.data.document_mask and config.data.packing:
        check_model_takes_document_ids(model)
    return model


def build_checkpoints(config: TrainingConfig, model: nn.Module, tokenizer: Any, record: RunRecord | None) -> Checkpoints:
    """The checkpoints of the run's folder, on rank 0; a stand-in that saves nothing on other ranks."""
    if record is None or record.folder is None:
        return Checkpoints()
    save_model = make_model_saver(model, tokenizer)
    folder, on_saved = record.folder.checkpoints, record.on_saved
    return CheckpointManager(folder, config.checkpoint, save_model_fn=save_model, on_saved=on_saved)


def make_model_saver(model: nn.Module, tokenizer: Any) -> SaveModel:
    """A function that saves a ready-to-use model folder: weights in Hugging Face's format, and the tokenizer."""
    save_weights = make_weight_saver(model)

    def save_model(weights: Mapping[str, Tensor], folder: Path) -> None:
        save_weights(weights, folder)
        tokenizer.save_pretrained(folder)

    return save_model


def flops_per_token(model: nn.Module, config: TrainingConfig) -> float | None:
    """Floating-point operations per token, as counted by the model; None if it does not count them."""
    count: Any = getattr(model, "flops_per_token", None)
    return count(config.data.sequence_length) if count is not None else None


def flops_of_run(config: TrainingConfig, loaders: Dataloaders, per_token: float | None) -> float | None:
    """Floating-point operations from the first step to the last, including those before a resume."""
    if per_token is None:
        return None
    steps = total_steps(config.train, loaders.train.sampler.steps_per_epoch)  # type: ignore[attr-defined]
    return steps * config.batch.global_batch_size * config.data.sequence_length * per_token
