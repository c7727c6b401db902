"""Sequences of documents of which only parts are trained on: conversations, prompts with their completions.

Documents are not divided among sequences, or answers would be separated from their questions. Packed, several documents share
a sequence of at most T + 1 tokens, by best-fit decreasing: the longest first, each into the fullest sequence that has room for
it. A document of more than T + 1 tokens is truncated; if no answer is left in it, it is skipped. T is data.sequence_length,
B the sequences of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.token_store import TokenStore

DOCUMENTS_AT_ONCE = 4096


class TruncatedDocuments(NamedTuple):
    """Documents that fit into sequences."""

    spans: np.ndarray
    """int64 [documents, 2]: [start, end) positions in the store, at most T + 1 tokens each, of which at least one is trained
    on."""
    truncated: int
    """How many were longer, and truncated."""
    without_answer: int
    """How many had no token to train on, and were skipped."""
    answer_cut_off: int
    """How many had none among their first T + 1 tokens, and were skipped."""


def truncate_and_filter(store: TokenStore, spans: np.ndarray, sequence_length: int) -> TruncatedDocuments:
    """The documents `spans` [documents, 2], ascending, of a store with a loss mask, truncated to `sequence_length` + 1 tokens.

    Documents without anything to train on are skipped.
    """
    assert store.loss_mask is not None, "without one all tokens are trained on"
    starts, ends = spans[:, 0], spans[:, 1]
    short_ends = np.minimum(ends, starts + sequence_length + 1)
    targets, targets_left = np.zeros((2, len(spans)), dtype=np.int64)
    for first in range(0, len(spans), DOCUMENTS_AT_ONCE):
        chunk = slice(first, first + DOCUMENTS_AT_ONCE)
        begin, end = int(starts[chunk][0]), int(ends[chunk][-1])
        before = np.append(0, np.cumsum(store.loss_mask[begin:end], dtype=np.int64))
        targets[chunk] = before[ends[chunk] - begin] - before[starts[chunk] - begin]
        targets_left[chunk] = before[short_ends[chunk] - begin] - before[starts[chunk] - begin]
    kept = targets_left > 0
    return TruncatedDocuments(
        np.stack([starts, short_ends], axis=1)[kept],
        truncated=int((kept & (short_ends < ends)).sum()),
        without_answer=int((targets == 0).sum()),
        answer_cut_off=int(((targets > 0) & ~kept).sum()),
    )


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The sequence of each document, int64 [documents]; `lengths` [documents] are at most `capacity`, the tokens of a sequence.

    Sequences are numbered in the order of their first documents, or the longest documents would come first. A bit for each size
    of room that some sequence has left finds the tightest fit at once.
    """
    sequences = np.zeros(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, num_sequences = 0, 0
    as_numbers = lengths.tolist()
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = as_numbers[document]
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = capacity, num_sequences
            num_sequences += 1
        sequences[document] = sequence
        if room > length:
            with_room[room - length].append(sequence)
            rooms |= 1 << (room - length)
    _, first_documents = np.unique(sequences, return_index=True)
    renumbered = np.empty(num_sequences, dtype=np.int64)
    renumbered[np.argsort(first_documents)] = np.arange(num_sequences)
    return renumbered[sequences]


class BestFitPackedDataset(torch.utils.data.Dataset):
    """Sequences of one or several complete documents; see the top of this file."""

    def __init__(
        self,
        store: TokenStore,
        spans: np.ndarray,
        sequence_length: int,
        *,
        padding: int,
        packing: bool,
        document_mask: bool = False,
        are_conversations: bool = False,
    ) -> None:
        """`spans` come from `truncate_and_filter`. Without `packing` a batch is as long as its longest document, else T."""
        self._tokens, self._loss_mask = np.asarray(store.tokens), np.asarray(store.loss_mask)
        starts, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
        sequences = best_fit_decreasing(lengths, sequence_length + 1) if packing else np.arange(len(spans))
        order = np.argsort(sequences, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]
        self._first = np.append(0, np.bincount(sequences).cumsum()) if len(spans) else np.zeros(1, dtype=np.int64)
        self._sequence_tokens = np.add.reduceat(self._lengths, self._first[:-1]) if len(spans) else lengths
        self._padding = padding
        self._width = sequence_length + 1 if packing else None
        self._document_mask = document_mask and packing
        self.fingerprint = store.key
        self.varies_in_length = not packing
        self.are_conversations = are_conversations

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """All sequences of a micro-batch at once."""
        chosen = np.array(indices, dtype=np.int64)
        num_documents = self._first[chosen + 1] - self._first[chosen]
        documents = _ranges(self._first[chosen], num_documents)
        lengths = self._lengths[documents]
        positions = _ranges(self._starts[documents], lengths)
        width = self._width or int(self._sequence_tokens[chosen].max())
        inside = np.arange(width) < self._sequence_tokens[chosen, None]
        read = self._tokens[positions].astype(np.int64)
        tokens = np.full(inside.shape, self._padding, dtype=np.int64)
        tokens[inside] = read
        targets = np.full(inside.shape, IGNORED_TARGET, dtype=np.int64)
        targets[inside] = np.where(self._loss_mask[positions], read, IGNORED_TARGET)
        if not self._document_mask:
            return Batch(_tensor(tokens[:, :-1]), _tensor(targets[:, 1:]))
        # Padding counts as a document after the last one: no target attends to it.
        numbers = np.repeat(num_documents[:, None], width, axis=1).astype(np.int32)
        numbers[inside] = np.repeat(_ranges(np.zeros_like(num_documents), num_documents), lengths)
        return Batch(_tensor(tokens[:, :-1]), _tensor(targets[:, 1:]), _tensor(numbers[:, :-1]))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each start and length, concatenated."""
    ends = lengths.cumsum()
    return np.arange(ends[-1]) + (starts - (ends - lengths)).repeat(lengths)
