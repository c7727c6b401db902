"""Rows of documents of which only parts carry loss: conversations, prompts with their completions.

No row holds a part of a document, or an answer would stand apart from what it answers. Packed, several documents share a row of
at most T + 1 tokens, by best-fit decreasing: the longest first, each into the fullest row that has room for it. A document of
more than T + 1 tokens is cut there, and one of which no answer is left is left out. T is data.sequence_length, B the rows of a
batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.token_store import TokenStore

DOCUMENTS_AT_A_TIME = 4096


class TruncatedDocuments(NamedTuple):
    """Documents as rows can hold them."""

    spans: np.ndarray
    """int64 [documents, 2]: [start, end) positions in the store, at most T + 1 tokens each, with one at least that carries
    loss."""
    cut: int
    """How many are longer, and were cut."""
    without_answer: int
    """How many have no token that carries loss, and were left out."""
    answer_cut_off: int
    """How many have none among their first T + 1 tokens, and were left out."""


def truncate_and_filter(store: TokenStore, spans: np.ndarray, sequence_length: int) -> TruncatedDocuments:
    """The documents `spans` [documents, 2], ascending, of a store with a loss mask, cut to `sequence_length` + 1 tokens."""
    assert store.loss_mask is not None, "without one every token carries loss"
    starts, ends = spans[:, 0], spans[:, 1]
    short_ends = np.minimum(ends, starts + sequence_length + 1)
    targets, targets_left = np.zeros((2, len(spans)), dtype=np.int64)
    for first in range(0, len(spans), DOCUMENTS_AT_A_TIME):
        some = slice(first, first + DOCUMENTS_AT_A_TIME)
        begin, end = int(starts[some][0]), int(ends[some][-1])
        before = np.append(0, np.cumsum(store.loss_mask[begin:end], dtype=np.int64))
        targets[some] = before[ends[some] - begin] - before[starts[some] - begin]
        targets_left[some] = before[short_ends[some] - begin] - before[starts[some] - begin]
    kept = targets_left > 0
    return TruncatedDocuments(
        np.stack([starts, short_ends], axis=1)[kept],
        cut=int((kept & (short_ends < ends)).sum()),
        without_answer=int((targets == 0).sum()),
        answer_cut_off=int(((targets > 0) & ~kept).sum()),
    )


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each document, int64 [documents]; `lengths` [documents] are at most `capacity`, the tokens of a row.

    Rows are numbered in the order of their first documents, so that the first rows are not the longest documents'. A bit for
    each room that some row has left finds the tightest fit at once.
    """
    rows = np.zeros(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, num_sequences = 0, 0
    as_numbers = lengths.tolist()
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = as_numbers[document]
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, num_sequences
            num_sequences += 1
        rows[document] = row
        if room > length:
            with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    _, first_documents = np.unique(rows, return_index=True)
    renumbered = np.empty(num_sequences, dtype=np.int64)
    renumbered[np.argsort(first_documents)] = np.arange(num_sequences)
    return renumbered[rows]


class BestFitPackedDataset(torch.utils.data.Dataset):
    """Rows of whole documents, several of them or one; see the top of this file."""

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
        """`spans` are those of `truncate_and_filter`. Without `packing` a batch is as long as its longest document, else T."""
        self._tokens, self._loss_mask = np.asarray(store.tokens), np.asarray(store.loss_mask)
        starts, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
        rows = best_fit_decreasing(lengths, sequence_length + 1) if packing else np.arange(len(spans))
        order = np.argsort(rows, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]
        self._first = np.append(0, np.bincount(rows).cumsum()) if len(rows) else np.zeros(1, dtype=np.int64)
        self._row_tokens = np.add.reduceat(self._lengths, self._first[:-1]) if len(rows) else lengths
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
        """All rows of a micro-batch at once."""
        chosen = np.array(indices, dtype=np.int64)
        documents_of_row = self._first[chosen + 1] - self._first[chosen]
        documents = _ranges(self._first[chosen], documents_of_row)
        lengths = self._lengths[documents]
        places = _ranges(self._starts[documents], lengths)
        width = self._width or int(self._row_tokens[chosen].max())
        inside = np.arange(width) < self._row_tokens[chosen, None]
        read = self._tokens[places].astype(np.int64)
        tokens = np.full(inside.shape, self._padding, dtype=np.int64)
        tokens[inside] = read
        targets = np.full(inside.shape, IGNORED_TARGET, dtype=np.int64)
        targets[inside] = np.where(self._loss_mask[places], read, IGNORED_TARGET)
        if not self._document_mask:
            return Batch(_tensor(tokens[:, :-1]), _tensor(targets[:, 1:]))
        # Padding is the document after the last one: nothing attends to it that counts.
        numbers = np.repeat(documents_of_row[:, None], width, axis=1).astype(np.int32)
        numbers[inside] = np.repeat(_ranges(np.zeros_like(documents_of_row), documents_of_row), lengths)
        return Batch(_tensor(tokens[:, :-1]), _tensor(targets[:, 1:]), _tensor(numbers[:, :-1]))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each length, one after the other."""
    ends = lengths.cumsum()
    return np.arange(ends[-1]) + (starts - (ends - lengths)).repeat(lengths)
