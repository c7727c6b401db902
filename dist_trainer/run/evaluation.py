"""Evaluating a finished model: its loss on validation data, on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.loader import create_validation_loader
from dist_trainer.data.token_bytes import build_token_bytes
from dist_trainer.data.tokenizers import configured_tokenizer, vocabulary_size
from dist_trainer.distributed.collectives import local_rank0_first
from dist_trainer.distributed.context import init_distributed
from dist_trainer.huggingface.model_files import find_model, model_folder
from dist_trainer.models.loss import model_loss
from dist_trainer.models.registry import check_model_fits
from dist_trainer.models.weights import open_model
from dist_trainer.parallel.cpu.memory import keep_freed_memory
from dist_trainer.tracking.run_log import configure_logging
from dist_trainer.training.precision import build_precision, warn_of_emulated_bf16
from dist_trainer.training.validation import evaluate

log = logging.getLogger(__name__)


def evaluate_model(path: Path, config: TrainingConfig, option_names: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Loss, perplexity, bits per byte and the number of tokens of the model at `path` (or of that name on the Hub), on rank 0.

    `option_names`: for keys that the command derived from one of its options, that option; messages name it. Raises
    DistTrainerError, the same one on every rank.
    """
    names = option_names or {}
    with init_distributed(config.distributed) as world:
        configure_logging(None, rank=world.rank)
        if world.device.type == "cpu":
            keep_freed_memory()
        # Before the data, which may take long. Of a model on the Hub only config.json was fetched so far.
        folder = local_rank0_first(world, lambda: model_folder(str(path), weights=True, key="RUN"))
        find_model(folder)
        tokenizer_key = names.get("data.tokenizer", "data.tokenizer")
        tokenizer = local_rank0_first(world, lambda: configured_tokenizer(config.data, key=tokenizer_key))
        data_key = names.get("data.validation_dataset", "data.validation_dataset")
        loader = create_validation_loader(config, world, tokenizer=tokenizer, key=data_key)
        model = open_model(folder, device=world.device)
        check_model_fits(model, vocabulary_size(tokenizer), config.data.sequence_length, name=f"{path}: the model")
        precision = build_precision(config.precision, world.device)
        if world.is_main:
            warn_of_emulated_bf16(precision, world.device)
        result = evaluate(
            model.eval(),
            loader,
            num_blocks=loader.sampler.num_blocks,  # type: ignore[attr-defined]
            world=world,
            precision=precision,
            loss_function=model_loss,
            token_bytes=build_token_bytes(tokenizer),
        )
        if not world.is_main or result is None:
            return None
        if result.bytes is None:
            log.info("bits per byte are null: this tokenizer's tokens do not decode to exactly the text that they encode")
        return {"data": config.data.validation_dataset or config.data.dataset, **result.metrics()}
