"""`create_dataloaders`: from the config's data section to loaders of this rank's micro-batches."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dist_trainer.config.rules import check_config
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.build_datasets import (
    VALIDATION_KEY,
    TokenDataset,
    build_datasets,
    build_validation_dataset,
    varies_in_length,
)
from dist_trainer.data.packing import identity_collate
from dist_trainer.data.sampler import GlobalOrderSampler, ValidationSampler, sequences_per_validation_block
from dist_trainer.data.tokenizers import Tokenizer, configured_tokenizer
from dist_trainer.distributed.collectives import local_rank0_first
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError, DataError, counted, type_named

log = logging.getLogger(__name__)

TOKENS_AT_ONCE = 2**15
"""Of micro-batches that have fewer, several are read at once."""


class Dataloaders(NamedTuple):
    """This rank's share of the data."""

    train: DataLoader
    """One epoch, that of its sampler's `set_epoch`; the trainer lets its sampler go on without end."""
    validation: DataLoader | None


def create_dataloaders(
    config: TrainingConfig,
    world: DistributedContext | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    train_dataset: Dataset | None = None,
    validation_dataset: Dataset | None = None,
) -> Dataloaders:
    """Loaders of `Batch`es of a micro-batch's rows, for this rank of `world` (default: a single process).

    Loads, tokenises (once per content, whatever the number of ranks), splits and packs what `config.data` names; or takes
    your own map-style `train_dataset` and `validation_dataset`. Their items are (inputs, targets) pairs, or dictionaries with
    these two keys. Inputs are tensors, arrays or numbers, or dictionaries of these; targets are one of these, and a target of
    -100 is not trained on. Raises DataError, ConfigError; the same on every rank.
    """
    check_config(config)
    world = world or DistributedContext.single()
    if train_dataset is not None:
        if config.data.document_mask:
            raise ConfigError(
                "data.document_mask: is true, but nothing says where documents end in a train_dataset of your own; set it to "
                "false, and give rows as Batches with `document_ids` where they are to be kept apart"
            )
        train = _own_rows(train_dataset, "train_dataset")
        validation = None if validation_dataset is None else _own_rows(validation_dataset, "validation_dataset")
    else:
        chosen = _agreed_tokenizer(config, world, tokenizer)
        train, validation = local_rank0_first(world, lambda: build_datasets(config.data, chosen))
    if world.is_main:
        for name, rows in (("to train on", train), ("to validate on", validation)):
            if rows is not None and rows.remark:
                log.warning("data %s: %s", name, rows.remark)
    validation_loader = None if validation is None else _validation_loader(validation, config, world)
    origin = f"data.dataset: {config.data.dataset}" if train_dataset is None else "train_dataset"
    return Dataloaders(_train_loader(train, config, world, origin=origin), validation_loader)


def create_validation_loader(
    config: TrainingConfig, world: DistributedContext, *, tokenizer: Tokenizer | None = None, key: str = VALIDATION_KEY
) -> DataLoader:
    """The validation loader alone, for evaluating a model; messages call data of their own `key`. Raises DataError where the
    config names no such data.
    """
    chosen = _agreed_tokenizer(config, world, tokenizer)
    rows = local_rank0_first(world, lambda: build_validation_dataset(config.data, chosen, key=key))
    if rows is None:
        raise DataError(f"data.validation_fraction: is 0, so there is nothing to validate on; name {key}")
    if world.is_main and rows.remark:
        log.warning("data to validate on: %s", rows.remark)
    return _validation_loader(rows, config, world, key=key)


def _own_rows(dataset: Dataset, name: str) -> TokenDataset:
    """The rows of a user's own data set. Raises DataError where they cannot be trained on, by the first one."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(f"{name}: {type_named(dataset)} has no __len__ or no __getitem__; give a map-style data set")
    if len(dataset) > 0:  # type: ignore[arg-type]
        try:
            collate_pairs([dataset[0]])
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error
    return TokenDataset(dataset, collate_pairs)


def _agreed_tokenizer(config: TrainingConfig, world: DistributedContext, tokenizer: Tokenizer | None) -> Tokenizer:
    return tokenizer or local_rank0_first(world, lambda: configured_tokenizer(config.data))


def _train_loader(rows: TokenDataset, config: TrainingConfig, world: DistributedContext, *, origin: str) -> DataLoader:
    found, needed = len(rows.dataset), config.batch.global_batch_size  # type: ignore[arg-type]
    if found < needed:
        raise DataError(
            f"{origin} makes {counted(found, 'row')} to train on, of {counted(config.data.sequence_length, 'token')}, fewer "
            f"than one global batch ({needed}); give more text, or lower batch.global_batch_size or data.sequence_length"
        )
    sampler = GlobalOrderSampler(
        rows.dataset, batch=config.batch, rank=world.rank, world_size=world.world_size, seed=config.seed
    )
    return _loader(rows, sampler, config, world)


def _validation_loader(
    rows: TokenDataset, config: TrainingConfig, world: DistributedContext, *, key: str = VALIDATION_KEY
) -> DataLoader:
    if len(rows.dataset) == 0:  # type: ignore[arg-type]
        raise DataError(f"the text or data set to validate on makes no row; give more of it, or name {key}")
    batch, max_global_batches = config.batch, config.validation.max_global_batches
    sampler = ValidationSampler(
        rows.dataset,
        micro_batch_size=sequences_per_validation_block(batch),
        rank=world.rank,
        world_size=world.world_size,
        # Rows that depend neither on the number of ranks nor on accumulation.
        max_sequences=None if max_global_batches is None else max_global_batches * batch.global_batch_size,
    )
    return _loader(rows, sampler, config, world)


class ChunkedDataLoader(DataLoader):
    """A DataLoader that reads several micro-batches at once, since reading costs by the call; they are the same ones."""

    def __init__(self, *arguments: Any, rows_at_once: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rows_at_once = rows_at_once

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        rows = iter(self.sampler)
        while several := list(itertools.islice(rows, self._rows_at_once)):
            read: Batch = self.dataset.__getitems__(several)  # type: ignore[attr-defined]
            yield from (read.pin_memory() if self.pin_memory else read).split(self.batch_size)  # type: ignore[arg-type]


def _loader(rows: TokenDataset, sampler: Any, config: TrainingConfig, world: DistributedContext) -> DataLoader:
    workers = config.data.num_workers
    if workers:
        # Tokenising is over; forked workers would otherwise warn of the tokenizer's threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    micro_batches = TOKENS_AT_ONCE // (sampler.micro_batch_size * config.data.sequence_length)
    ahead = micro_batches > 1 and not workers and rows.collate is identity_collate and not varies_in_length(rows.dataset)
    kind = partial(ChunkedDataLoader, rows_at_once=micro_batches * sampler.micro_batch_size) if ahead else DataLoader
    return kind(
        rows.dataset,
        batch_size=sampler.micro_batch_size,
        sampler=sampler,
        collate_fn=rows.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=world.device.type == "cuda",
        # A generator of its own, so that making an iterator draws nothing from the model's random numbers.
        generator=torch.Generator().manual_seed(config.seed),
    )


def collate_pairs(pairs: Sequence[Any]) -> Batch:
    """One Batch of (inputs, targets) pairs, dictionaries with these keys, or Batches of a row. Raises ValueError for others."""
    if isinstance(pairs[0], Batch):
        document_ids = None if pairs[0].document_ids is None else torch.stack([p.document_ids for p in pairs])
        return Batch(torch.stack([p.input_ids for p in pairs]), torch.stack([p.targets for p in pairs]), document_ids)
    pairs = [_pair_of(item) for item in pairs]
    inputs, targets = default_collate(pairs)
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets are {type_named(pairs[0][1])}; give one tensor, array or number")
    return Batch(inputs, targets)


def _pair_of(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        if item.keys() != {"inputs", "targets"}:
            raise ValueError(
                f"its items are dictionaries with the keys {', '.join(map(str, item))}; give them the keys inputs and targets "
                "(inputs may be a dictionary of its own), or give (inputs, targets) pairs. The targets are what the model's "
                "output is compared with as it is: labels of Hugging Face's causal models have to be shifted by one token"
            )
        return item["inputs"], item["targets"]
    if not isinstance(item, list | tuple) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, list | tuple) else ""
        raise ValueError(f"its items are {type_named(item)}{size}; give (inputs, targets) pairs")
    return item[0], item[1]
