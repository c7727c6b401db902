"""`create_dataloaders`: builds the loaders of this rank's micro-batches, which may read several at once."""

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
from dist_trainer.config.schema import BatchConfig, DataConfig, TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.build_datasets import VALIDATION_KEY, TokenDataset, build_datasets, build_validation_dataset
from dist_trainer.data.packing import identity_collate
from dist_trainer.data.sampler import GlobalOrderSampler, ValidationSampler, sequences_per_validation_block
from dist_trainer.data.tokenizers import Tokenizer, configured_tokenizer
from dist_trainer.distributed.collectives import local_rank0_first
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError, DataError, counted, type_named

log = logging.getLogger(__name__)

TOKENS_AT_ONCE = 2**15
"""If micro-batches have fewer sequences, several are read at once."""


def varies_in_length(dataset: Dataset) -> bool:
    """Whether batches are as long as their longest sequence, so that their lengths differ."""
    return getattr(dataset, "varies_in_length", False)


def are_conversations(dataset: Dataset) -> bool:
    """Whether the sequences are conversations. The config does not say so if they were recognised by their column's name."""
    return getattr(dataset, "are_conversations", False)


class Dataloaders(NamedTuple):
    """Loaders of this rank's share of the data."""

    train: DataLoader
    """Iterates over one epoch, set by its sampler's `set_epoch`; the trainer makes the sampler continue without end."""
    validation: DataLoader | None


def create_dataloaders(
    config: TrainingConfig,
    world: DistributedContext | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    train_dataset: Dataset | None = None,
    validation_dataset: Dataset | None = None,
) -> Dataloaders:
    """Loaders of micro-batches (`Batch`) for this rank of `world` (default: a single process).

    Loads, tokenises (once per content, whatever the number of ranks), splits and packs the data that `config.data` names; or
    takes your own map-style `train_dataset` and `validation_dataset`. Their items are (inputs, targets) pairs, or dictionaries
    with these two keys. Inputs are tensors, arrays or numbers, or dictionaries of these; targets are one of these, and a target
    of -100 is not trained on. Raises DataError, ConfigError; the same on every rank.
    """
    check_config(config)
    world = world or DistributedContext.single()
    if train_dataset is not None:
        if config.data.document_mask:
            raise ConfigError(
                "data.document_mask: is true, but nothing says where documents end in a train_dataset of your own; set it to "
                "false, and give Batches with `document_ids` to block attention across documents"
            )
        train = _own_dataset(train_dataset, "train_dataset")
        validation = None if validation_dataset is None else _own_dataset(validation_dataset, "validation_dataset")
    else:
        tokenizer = tokenizer or local_rank0_first(world, lambda: configured_tokenizer(config.data))
        train, validation = local_rank0_first(world, lambda: build_datasets(config.data, tokenizer))
    if world.is_main:
        for name, data in (("training data", train), ("validation data", validation)):
            if data is not None and data.warning:
                log.warning("%s: %s", name, data.warning)
    validation_loader = None
    if validation is not None:
        held_out = _validation_sampler(validation, config.batch, world, max_batches=config.validation.max_global_batches)
        validation_loader = _loader(validation, held_out, config.data, world, seed=config.seed)
    origin = f"data.dataset: {config.data.dataset}" if train_dataset is None else "train_dataset"
    length, seed = config.data.sequence_length, config.seed
    sampler = _train_sampler(train, config.batch, world, sequence_length=length, seed=seed, origin=origin)
    return Dataloaders(_loader(train, sampler, config.data, world, seed=seed), validation_loader)


def create_validation_loader(
    config: TrainingConfig, world: DistributedContext, *, tokenizer: Tokenizer, key: str = VALIDATION_KEY
) -> DataLoader:
    """Only the validation loader, to evaluate a model. In messages, `key` is the key of the validation dataset.

    Raises DataError if the config names no validation data.
    """
    data = local_rank0_first(world, lambda: build_validation_dataset(config.data, tokenizer, key=key))
    if data is None:
        raise DataError(f"data.validation_fraction: is 0, so there is nothing to validate on; name {key}")
    if world.is_main and data.warning:
        log.warning("validation data: %s", data.warning)
    max_batches = config.validation.max_global_batches
    sampler = _validation_sampler(data, config.batch, world, max_batches=max_batches, key=key)
    return _loader(data, sampler, config.data, world, seed=config.seed)


def _own_dataset(dataset: Dataset, name: str) -> TokenDataset:
    """A user's own dataset. Raises DataError if it cannot be trained on, judging by its first item."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(f"{name}: {type_named(dataset)} has no __len__ or no __getitem__; give a map-style dataset")
    if len(dataset) > 0:  # type: ignore[arg-type]
        try:
            collate_pairs([dataset[0]])
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error
    return TokenDataset(dataset, collate_pairs)


def _train_sampler(
    data: TokenDataset, batch: BatchConfig, world: DistributedContext, *, sequence_length: int, seed: int, origin: str
) -> GlobalOrderSampler:
    """Raises DataError, in which `origin` names the data, if they are fewer than one global batch."""
    available, needed = len(data.dataset), batch.global_batch_size  # type: ignore[arg-type]
    if available < needed:
        raise DataError(
            f"{origin} gives {counted(available, 'training sequence')} of {counted(sequence_length, 'token')}, "
            f"fewer than one global batch ({needed}); give more text, or lower batch.global_batch_size or data.sequence_length"
        )
    return GlobalOrderSampler(data.dataset, batch=batch, rank=world.rank, world_size=world.world_size, seed=seed)


def _validation_sampler(
    data: TokenDataset, batch: BatchConfig, world: DistributedContext, *, max_batches: int | None, key: str = VALIDATION_KEY
) -> ValidationSampler:
    """At most `max_batches` global batches, however many ranks and micro-batches there are. Raises DataError that names `key`
    if there are no data.
    """
    if len(data.dataset) == 0:  # type: ignore[arg-type]
        raise DataError(f"the validation data give no sequence; give more data, or name {key}")
    return ValidationSampler(
        data.dataset,
        micro_batch_size=sequences_per_validation_block(batch),
        rank=world.rank,
        world_size=world.world_size,
        max_sequences=None if max_batches is None else max_batches * batch.global_batch_size,
    )


def _loader(
    data: TokenDataset,
    sampler: GlobalOrderSampler | ValidationSampler,
    config: DataConfig,
    world: DistributedContext,
    *,
    seed: int,
) -> DataLoader:
    num_workers, micro_batch_size = config.num_workers, sampler.micro_batch_size
    if num_workers:
        # Tokenising is over; forked workers would otherwise warn of the tokenizer's threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    at_once = TOKENS_AT_ONCE // (micro_batch_size * config.sequence_length)
    is_chunked = at_once > 1 and not num_workers and data.collate is identity_collate and not varies_in_length(data.dataset)
    loader_class = partial(ChunkedDataLoader, sequences_at_once=at_once * micro_batch_size) if is_chunked else DataLoader
    return loader_class(
        data.dataset,
        batch_size=micro_batch_size,
        sampler=sampler,
        collate_fn=data.collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=world.device.type == "cuda",
        # Its own generator, so that making an iterator does not advance the model's random number generator.
        generator=torch.Generator().manual_seed(seed),
    )


class ChunkedDataLoader(DataLoader):
    """A DataLoader that reads several micro-batches at once, since each read has a fixed cost; the batches are the same."""

    def __init__(self, *arguments: Any, sequences_at_once: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sequences_at_once = sequences_at_once

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        indices = iter(self.sampler)
        while several := list(itertools.islice(indices, self._sequences_at_once)):
            read: Batch = self.dataset.__getitems__(several)  # type: ignore[attr-defined]
            yield from (read.pin_memory() if self.pin_memory else read).split(self.batch_size)  # type: ignore[arg-type]


def collate_pairs(items: Sequence[Any]) -> Batch:
    """A Batch of (inputs, targets) pairs, of dictionaries with these keys, or of Batches of one sequence each.

    Raises ValueError for anything else.
    """
    if isinstance(items[0], Batch):
        document_ids = None if items[0].document_ids is None else torch.stack([item.document_ids for item in items])
        input_ids, targets = (torch.stack([getattr(item, name) for item in items]) for name in ("input_ids", "targets"))
        return Batch(input_ids, targets, document_ids)
    pairs = [_as_pair(item) for item in items]
    inputs, targets = default_collate(pairs)
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets are {type_named(pairs[0][1])}; give one tensor, array or number")
    return Batch(inputs, targets)


def _as_pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        if item.keys() != {"inputs", "targets"}:
            raise ValueError(
                f"its items are dictionaries with the keys {', '.join(map(str, item))}; give them the keys inputs and targets "
                "(inputs may be a dictionary itself), or give (inputs, targets) pairs. Targets are compared with the model's "
                "output position by position: labels for Hugging Face's causal models must be shifted by one token"
            )
        return item["inputs"], item["targets"]
    if not isinstance(item, list | tuple) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, list | tuple) else ""
        raise ValueError(f"its items are {type_named(item)}{size}; give (inputs, targets) pairs")
    return item[0], item[1]
