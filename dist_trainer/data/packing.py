"""Rows of tokens from documents: packed, or one document a row. T is data.sequence_length, B the rows of a batch.

Packed, the documents of a split are one long stream of N tokens (each document ends with EOS), and row i is the T + 1
tokens from i * T on: its first T are what the model reads, its last T what it should have said. So every token but the
very first is a target exactly once; only the last row is padded.

Where documents are kept apart (data.document_mask), each token's document goes with it, and no document has to say how the
next one begins: every token but the first of each document is a target exactly once, as with one document a row. The
borders are those of the token store, not where an EOS stands: text may contain its spelling.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.token_store import TokenStore


class TokenStream:
    """Some documents of a store, end to end, in the store's order."""

    def __init__(self, store: TokenStore, spans: np.ndarray | None = None) -> None:
        """`spans` [documents, 2] are [start, end) token positions in the store, ascending. None: everything, as one."""
        starts, ends = np.array([[0, len(store.tokens)]] if spans is None else spans, dtype=np.int64).reshape(-1, 2).T
        segments = np.flatnonzero(np.append(True, starts[1:] != ends[:-1])[: len(starts)])
        self._tokens = np.asarray(store.tokens)  # the same memory map, without what np.memmap costs at each call
        self._document_ends = (ends - starts).cumsum()
        # Runs of documents that also stand end to end in the store: where they begin here, and how far they were moved.
        self._segment_starts = (self._document_ends - (ends - starts))[segments]
        self._moved = starts[segments] - self._segment_starts

    def __len__(self) -> int:
        return int(self._document_ends[-1]) if len(self._document_ends) else 0

    def gather(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `positions` [B] on, all rows at once: [B, length] in the store's type.

        After the stream's end anything may stand.
        """
        segments = np.searchsorted(self._segment_starts, positions, side="right") - 1
        starts = positions + self._moved[segments]
        following = np.searchsorted(self._segment_starts, positions + (length - 1), side="right") - 1
        in_pieces = (segments != following) | (positions + length > len(self))
        if length > len(self._tokens):
            return self._gather_pieces(positions, length)
        # Every place of the store as a row's beginning, which copies nothing: rows are then copied whole, at memory's speed.
        last, stride = len(self._tokens) - length, self._tokens.strides[0]
        windows = np.ndarray((last + 1, length), self._tokens.dtype, self._tokens, strides=(stride, stride))
        rows = windows[np.minimum(starts, last)]
        if in_pieces.any():
            rows[in_pieces] = self._gather_pieces(positions[in_pieces], length)
        return rows

    def _gather_pieces(self, positions: np.ndarray, length: int) -> np.ndarray:
        """`gather`, of rows that hold parts of several segments."""
        rows, columns, segments = _inside(self._segment_starts, positions, length)
        steps = np.ones((len(positions), length), dtype=np.int64)  # from each token's place in the store to the next one's
        steps[:, 0] = positions + self._moved[np.searchsorted(self._segment_starts, positions, side="right") - 1]
        steps[rows, columns] += self._moved[segments] - self._moved[segments - 1]
        return self._tokens.take(steps.cumsum(axis=1), mode="clip")

    def borders(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and column (from 1 on) of each token that begins a document, or what is after the last one, in `gather`'s rows."""
        return _inside(self._document_ends, positions, length)[:2]


def _inside(places: np.ndarray, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of the ascending `places` lie inside the rows of `length` that begin at `positions`: row, column, number."""
    first = np.searchsorted(places, positions, side="right")
    counts = np.searchsorted(places, positions + (length - 1), side="right") - first
    rows = np.arange(len(positions)).repeat(counts)
    numbers = np.arange(len(rows)) + (first - (counts.cumsum() - counts))[rows]
    return rows, places[numbers] - positions[rows], numbers


class PackedRows(torch.utils.data.Dataset):
    """Rows of a stream; see the top of this file."""

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        *,
        padding: int,
        fingerprint: str,
        document_mask: bool = False,
    ) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self.padding = padding
        self.fingerprint = fingerprint
        self.document_mask = document_mask

    def __len__(self) -> int:
        return -(-max(0, len(self.stream) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """All rows of a micro-batch at once."""
        T = self.sequence_length
        positions = np.array(indices, dtype=np.int64) * T
        rows = self.stream.gather(positions, T + 1)
        counts = len(self.stream) - positions
        short = np.flatnonzero(counts <= T)
        for row in short:
            rows[row, counts[row] :] = self.padding
        tokens, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
        for row in short:
            targets[row, counts[row] - 1 :] = IGNORED_TARGET
        if not self.document_mask:
            return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
        begins = np.zeros(rows.shape, dtype=np.int32)
        border_rows, columns = self.stream.borders(positions, T + 1)
        begins[border_rows, columns] = 1
        targets[border_rows, columns - 1] = IGNORED_TARGET
        documents = begins[:, :-1].cumsum(axis=1, dtype=np.int32)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(documents))


def as_it_is(batch: Batch) -> Batch:
    """The collate function of PackedRows, which read a whole micro-batch at once."""
    return batch


class DocumentRows(torch.utils.data.Dataset):
    """One document a row, of at most T + 1 tokens; a longer one goes on in further rows, so that no target is lost."""

    def __init__(self, store: TokenStore, spans: np.ndarray, sequence_length: int) -> None:
        self._tokens = np.asarray(store.tokens)  # the same memory map, without what np.memmap costs at each call
        starts, ends = spans.T
        rows = -(-np.maximum(0, ends - starts - 1) // sequence_length)
        first_row = np.repeat(np.cumsum(rows) - rows, rows)
        begins = np.repeat(starts, rows) + (np.arange(rows.sum()) - first_row) * sequence_length
        self._begins = begins
        self._ends = np.minimum(begins + sequence_length + 1, np.repeat(ends, rows))
        self.fingerprint = store.key

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Tensor:
        """Ids: int64, one to T + 1 of them."""
        return torch.from_numpy(self._tokens[self._begins[index] : self._ends[index]].astype(np.int64))


class PaddingCollator:
    """Pads documents to the longest of them, through transformers' own collator; padding carries no loss."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import DataCollatorForLanguageModeling

        # Some published tokenizers pad on the left, where a decoder without a mask would attend to it.
        on_the_right = copy.deepcopy(tokenizer)
        on_the_right.padding_side = "right"
        self._collate = DataCollatorForLanguageModeling(on_the_right, mlm=False)

    def __call__(self, rows: list[Tensor]) -> Batch:
        """A Batch of rows. Their lengths tell padding, for the padding token may be the EOS, which does count.

        The collator gets tensors, which it copies whole; dictionaries it would take apart token by token.
        """
        ids = self._collate(rows)["input_ids"]
        lengths = torch.tensor([len(row) for row in rows])
        after_the_end = torch.arange(1, ids.shape[1]) >= lengths[:, None]
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(after_the_end, IGNORED_TARGET))
