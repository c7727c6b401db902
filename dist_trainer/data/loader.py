"""DataLoaders of micro-batches: how samples become a Batch, and reading several micro-batches at once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dist_trainer.data.batch import Batch
from dist_trainer.data.packing import identity_collate
from dist_trainer.data.sampler import GlobalOrderSampler, ValidationSampler
from dist_trainer.errors import type_named

TOKENS_AT_ONCE = 2**15
"""If micro-batches have fewer, several are read at once."""


class TokenDataset(NamedTuple):
    """A map-style data set of sequences, not yet divided among ranks, and how sequences become a batch."""

    dataset: Dataset
    collate: Callable[[Any], Batch]
    warning: str = ""
    """What was truncated or skipped, if anything."""


def varies_in_length(dataset: Dataset) -> bool:
    """Whether batches are as long as their longest sequence, so that their lengths differ."""
    return getattr(dataset, "varies_in_length", False)


def are_conversations(dataset: Dataset) -> bool:
    """Whether the sequences are conversations. The config does not say it if they were found by the name of their column."""
    return getattr(dataset, "are_conversations", False)


class ChunkedDataLoader(DataLoader):
    """A DataLoader that reads several micro-batches at once, since reading costs by the call; the batches are the same."""

    def __init__(self, *arguments: Any, sequences_at_once: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sequences_at_once = sequences_at_once

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        indices = iter(self.sampler)
        while several := list(itertools.islice(indices, self._sequences_at_once)):
            read: Batch = self.dataset.__getitems__(several)  # type: ignore[attr-defined]
            yield from (read.pin_memory() if self.pin_memory else read).split(self.batch_size)  # type: ignore[arg-type]


def make_loader(
    data: TokenDataset,
    sampler: GlobalOrderSampler | ValidationSampler,
    *,
    sequence_length: int,
    num_workers: int,
    pin_memory: bool,
    seed: int,
) -> DataLoader:
    """A loader of the micro-batches that `sampler` names. `seed` is that of its workers."""
    if num_workers:
        # Tokenising is over; forked workers would otherwise warn of the tokenizer's threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    micro_batches = TOKENS_AT_ONCE // (sampler.micro_batch_size * sequence_length)
    is_chunked = (
        micro_batches > 1 and not num_workers and data.collate is identity_collate and not varies_in_length(data.dataset)
    )
    at_once = micro_batches * sampler.micro_batch_size
    loader_class = partial(ChunkedDataLoader, sequences_at_once=at_once) if is_chunked else DataLoader
    return loader_class(
        data.dataset,
        batch_size=sampler.micro_batch_size,
        sampler=sampler,
        collate_fn=data.collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        # Its own generator, so that making an iterator draws nothing from the model's random numbers.
        generator=torch.Generator().manual_seed(seed),
    )


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
