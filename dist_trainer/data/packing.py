"""Rows of tokens from text, all of which carries loss: packed, or one document a row. T is data.sequence_length, B the rows of
a batch.

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
        # Runs of documents that also stand end to end in the store: where they begin there and here; and the end.
        self._starts = starts[segments]
        self._virtual = np.append((self._document_ends - (ends - starts))[segments], len(self))

    def __len__(self) -> int:
        return int(self._document_ends[-1]) if len(self._document_ends) else 0

    def gather(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `positions` [B] on, all rows at once: [B, length] in the store's type.

        After the stream's end anything may stand.
        """
        segments, end_segments = (
            self._virtual.searchsorted(places, side="right") - 1 for places in (positions, positions + (length - 1))
        )
        if len(self._tokens) < length:
            rows = np.zeros((len(positions), length), self._tokens.dtype)
        else:
            # Every place of the store as a row's beginning, which copies nothing: rows are copied whole, at memory's speed.
            places, stride = len(self._tokens) - length + 1, self._tokens.strides[0]
            windows = np.ndarray((places, length), self._tokens.dtype, self._tokens, strides=(stride, stride))
            starts = positions + (self._starts - self._virtual[:-1])[segments]
            rows = windows[np.minimum(starts, places - 1)]
        for row in (segments != end_segments).nonzero()[0]:
            self._read_into(rows[row], int(positions[row]), int(segments[row]))
        return rows

    def _read_into(self, out: np.ndarray, position: int, segment: int) -> None:
        """Copy tokens from `position` on, in `segment`, into `out`, as far as there are any, segment by segment."""
        done, wanted = 0, min(len(out), len(self) - position)
        while done < wanted:
            inside = position + done - int(self._virtual[segment])
            start = int(self._starts[segment]) + inside
            count = min(wanted - done, int(self._virtual[segment + 1] - self._virtual[segment]) - inside)
            out[done : done + count] = self._tokens[start : start + count]
            done += count
            segment += 1

    def borders(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and column (from 1 on) of each token in `gather`'s rows that begins a document, or follows the last one."""
        first, end = (
            self._document_ends.searchsorted(places, side="right") for places in (positions, positions + (length - 1))
        )
        counts = end - first
        rows = np.arange(len(positions)).repeat(counts)
        numbers = np.arange(len(rows)) + (first - (counts.cumsum() - counts))[rows]
        return rows, self._document_ends[numbers] - positions[rows]


class PackedDataset(torch.utils.data.Dataset):
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
        short = (counts <= T).nonzero()[0]
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
        document_ids = begins[:, :-1].cumsum(axis=1, dtype=np.int32)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(document_ids))


def identity_collate(batch: Batch) -> Batch:
    """The collate function of rows that read a whole micro-batch at once."""
    return batch


class DocumentDataset(torch.utils.data.Dataset):
    """One document a row, of at most T + 1 tokens; a longer one goes on in further rows, so that no target is lost."""

    varies_in_length = True
    """Batches are as long as their longest document."""

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
