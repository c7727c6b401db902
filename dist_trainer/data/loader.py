"""`create_dataloaders`: from the config's data section to loaders of this rank's micro-batches."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from dist_trainer.config.schema import DataConfig, TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.datasets import open_source
from dist_trainer.data.packing import DocumentRows, PackedRows, PaddingCollator, TokenStream
from dist_trainer.data.sampler import GlobalOrderSampler, KeyedPermutation, ValidationSampler, rows_per_validation_block
from dist_trainer.data.split import Split
from dist_trainer.data.template import text_of
from dist_trainer.data.token_store import TokenStore, default_cache_dir, token_store
from dist_trainer.data.tokenization import Tokenizer, load_tokenizer
from dist_trainer.distributed.collectives import first_on_each_node
from dist_trainer.distributed.world import World
from dist_trainer.errors import DataError

log = logging.getLogger(__name__)

SPLIT_KEY = (0x5917, 0)
"""Which documents are held out does not depend on the run's seed: runs with other seeds validate on the same text."""

Spans = np.ndarray
"""int64 [documents, 2], in ascending order: [start, end) positions in a token store."""


class Dataloaders(NamedTuple):
    """This rank's share of the data."""

    train: DataLoader
    """Without end; its sampler says where it stands."""
    validation: DataLoader | None


class Rows(NamedTuple):
    """Data sets of rows, before any rank or order."""

    train: Dataset
    validation: Dataset | None
    collate: Callable[[Any], Batch]


def create_dataloaders(
    config: TrainingConfig,
    world: World | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    train_dataset: Dataset | None = None,
    validation_dataset: Dataset | None = None,
) -> Dataloaders:
    """Loaders of `Batch`es of a micro-batch's rows, for this rank of `world` (default: a single process).

    Loads, tokenises (once per content, whatever the number of ranks), splits and packs what `config.data` names; or takes
    your own map-style `train_dataset` and `validation_dataset` of (inputs, targets) pairs, where a target of -100 carries
    no loss. Raises DataError, ConfigError; the same on every rank.
    """
    world = world or World.single()
    if train_dataset is not None:
        rows = Rows(train_dataset, validation_dataset, collate_pairs)
    else:
        rows = _agreed_rows(config, world, tokenizer)
    _refuse_too_few(rows, config)
    sampler = GlobalOrderSampler(rows.train, batch=config.batch, rank=world.rank, world_size=world.world_size, seed=config.seed)
    train = _loader(rows.train, sampler, rows.collate, config=config, world=world)
    return Dataloaders(train, _validation_loader(rows, config, world))


def create_validation_loader(config: TrainingConfig, world: World, *, tokenizer: Tokenizer | None = None) -> DataLoader:
    """The validation loader alone, for evaluating a model. Raises DataError where the config names no such data."""
    loader = _validation_loader(_agreed_rows(config, world, tokenizer), config, world)
    if loader is None:
        raise DataError("data.validation_fraction: is 0, so there is nothing to validate on; name data.validation_dataset")
    return loader


def _agreed_rows(config: TrainingConfig, world: World, tokenizer: Tokenizer | None) -> Rows:
    chosen = tokenizer or first_on_each_node(world, lambda: load_tokenizer(config.data.tokenizer))
    return first_on_each_node(world, lambda: _rows(config.data, chosen))


def _validation_loader(rows: Rows, config: TrainingConfig, world: World) -> DataLoader | None:
    if rows.validation is None:
        return None
    batch, max_batches = config.batch, config.validation.max_batches
    sampler = ValidationSampler(
        rows.validation,
        micro_batch_size=rows_per_validation_block(batch),
        rank=world.rank,
        world_size=world.world_size,
        # Rows that do not depend on the number of ranks.
        max_rows=None if max_batches is None else max_batches * (batch.micro_batch_size or batch.global_batch_size),
    )
    return _loader(rows.validation, sampler, rows.collate, config=config, world=world)


def _loader(
    dataset: Dataset, sampler: Any, collate: Callable[[Any], Batch], *, config: TrainingConfig, world: World
) -> DataLoader:
    workers = config.data.num_workers
    if workers:
        # Tokenising is over; forked workers would otherwise warn of the tokenizer's threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return DataLoader(
        dataset,
        batch_size=sampler.micro_batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=world.device.type == "cuda",
        # A generator of its own, so that making an iterator draws nothing from the model's random numbers.
        generator=torch.Generator().manual_seed(config.seed),
    )


def _refuse_too_few(rows: Rows, config: TrainingConfig) -> None:
    found, needed = len(rows.train), config.batch.global_batch_size  # type: ignore[arg-type]
    if found < needed:
        raise DataError(
            f"data.dataset: {config.data.dataset} makes {found} rows of {config.data.sequence_length} tokens, fewer than one "
            f"global batch ({needed}); give more text, or lower batch.global_batch_size or data.sequence_length"
        )
    if rows.validation is not None and len(rows.validation) == 0:  # type: ignore[arg-type]
        raise DataError("data.validation_dataset: the validation text makes no row; give more of it")


def collate_pairs(pairs: Sequence[Any]) -> Batch:
    """(inputs, targets) pairs, or Batches of a row, to one Batch."""
    if isinstance(pairs[0], Batch):
        return Batch(torch.stack([p.tokens for p in pairs]), torch.stack([p.targets for p in pairs]))
    inputs, targets = default_collate(list(pairs))
    return Batch(inputs, targets)


def as_it_is(batch: Batch) -> Batch:
    """For data sets that read a whole micro-batch at once."""
    return batch


def _rows(config: DataConfig, tokenizer: Tokenizer) -> Rows:
    source = open_source(config.dataset, config)
    train = _store(source.train, config, tokenizer)
    held_out = source.validation
    if config.validation_dataset is not None:
        other = open_source(config.validation_dataset, config)
        held_out = other.validation or other.train
    if held_out is not None:
        validation = _store(held_out, config, tokenizer)
        train_spans, validation_spans = _document_spans(train), _document_spans(validation)
    else:
        validation = train
        train_spans, validation_spans = split_by_document(train, config.validation_fraction)
    log.info(
        "data %s: %d documents, %d tokens to train on; %d documents, %d tokens to validate on",
        *(config.dataset, len(train_spans), _num_tokens(train_spans)),
        *(len(validation_spans), _num_tokens(validation_spans)),
    )
    make = _packed if config.packing else _unpacked
    return Rows(
        make(train, train_spans, config, tokenizer),
        make(validation, validation_spans, config, tokenizer) if len(validation_spans) else None,
        as_it_is if config.packing else PaddingCollator(tokenizer),
    )


def _store(split: Split, config: DataConfig, tokenizer: Tokenizer) -> TokenStore:
    return token_store(
        split,
        tokenizer,
        text=text_of(config.text_column, config.template),
        text_identity=json.dumps([config.text_column, config.template]),
        cache_dir=Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir(),
    )


def _packed(store: TokenStore, spans: Spans, config: DataConfig, tokenizer: Tokenizer) -> PackedRows:
    stream = TokenStream(store, spans)
    return PackedRows(stream, config.sequence_length, padding=tokenizer.eos_token_id, fingerprint=store.key)


def _unpacked(store: TokenStore, spans: Spans, config: DataConfig, tokenizer: Tokenizer) -> DocumentRows:
    return DocumentRows(store, spans, config.sequence_length)


def split_by_document(store: TokenStore, fraction: float) -> tuple[Spans, Spans]:
    """Hold out `fraction` of the documents, at least one, the same ones each time; of a single document, its last part."""
    spans = _document_spans(store)
    if fraction == 0:
        return spans, spans[:0]
    if len(spans) == 1:
        start, end = spans[0].tolist()
        border = max(start + 1, end - max(2, round(fraction * (end - start))))
        log.info("the data is a single document: its last %d tokens are held out for validation", end - border)
        return np.array([[start, border]]), np.array([[border, end]])
    count = min(len(spans) - 1, max(1, round(fraction * len(spans))))
    held_out = np.zeros(len(spans), dtype=bool)
    held_out[KeyedPermutation(len(spans), SPLIT_KEY)(np.arange(count))] = True
    return spans[~held_out], spans[held_out]


def _document_spans(store: TokenStore) -> Spans:
    return np.stack([store.offsets[:-1], store.offsets[1:]], axis=1)


def _num_tokens(spans: Spans) -> int:
    return int((spans[:, 1] - spans[:, 0]).sum())
