"""Turns documents into sequences: packed, or one per sequence. T is data.sequence_length, B the sequences of a batch.

**Text without a loss mask.** If packed, the documents of a split are one long stream of N tokens (each ends with EOS),
and sequence i is the T + 1 tokens from position i * T: the first T are the inputs, the last T the targets. So every token but
the very first is a target exactly once; only the last sequence is padded.

With data.document_mask, each token comes with its document's number, and the first token of a document is not a target, as with
one document per sequence. Document borders come from the token store, not from EOS tokens: text may contain their spelling.

**Documents with a loss mask**: conversations, prompts with their completions. They are not divided among sequences, or answers
would be separated from their questions. If packed, several documents share a sequence of at most T + 1 tokens, by best-fit
decreasing: the longest first, each into the fullest sequence that has room for it. A document of more than T + 1 tokens is
truncated; if no answer is left in it, it is skipped.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.token_store import TokenStore

DOCUMENTS_AT_ONCE = 4096


class TokenStream:
    """Some documents of a store, concatenated in the store's order."""

    def __init__(self, store: TokenStore, spans: np.ndarray | None = None) -> None:
        """`spans` [documents, 2] are [start, end) positions in the store, ascending. None: everything, as one document."""
        starts, ends = np.array([[0, len(store.tokens)]] if spans is None else spans, dtype=np.int64).reshape(-1, 2).T
        segments = np.flatnonzero(np.append(True, starts[1:] != ends[:-1])[: len(starts)])
        self._tokens = np.asarray(store.tokens)  # the same memory map, without the overhead of np.memmap per call
        self._document_ends = (ends - starts).cumsum()
        # A segment is a run of documents that are adjacent in the store: its start there and in the stream, and the end.
        self._starts = starts[segments]
        self._virtual = np.append((self._document_ends - (ends - starts))[segments], len(self))

    def __len__(self) -> int:
        return int(self._document_ends[-1]) if len(self._document_ends) else 0

    def gather(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `positions` [B], all at once: [B, length] in the store's type.

        Arbitrary values follow the end of the stream.
        """
        segments, end_segments = (
            self._virtual.searchsorted(edge, side="right") - 1 for edge in (positions, positions + (length - 1))
        )
        if len(self._tokens) < length:
            rows = np.zeros((len(positions), length), self._tokens.dtype)
        else:
            # A view of all windows of the store, without copying; each sequence is then one copy, at memory speed.
            num_windows, stride = len(self._tokens) - length + 1, self._tokens.strides[0]
            windows = np.ndarray((num_windows, length), self._tokens.dtype, self._tokens, strides=(stride, stride))
            starts = positions + (self._starts - self._virtual[:-1])[segments]
            rows = windows[np.minimum(starts, num_windows - 1)]
        for row in (segments != end_segments).nonzero()[0]:
            self._read_into(rows[row], int(positions[row]), int(segments[row]))
        return rows

    def _read_into(self, out: np.ndarray, position: int, segment: int) -> None:
        """Copy tokens from `position`, which is in `segment`, into `out`, segment by segment, up to the end of the stream."""
        done, wanted = 0, min(len(out), len(self) - position)
        while done < wanted:
            inside = position + done - int(self._virtual[segment])
            start = int(self._starts[segment]) + inside
            count = min(wanted - done, int(self._virtual[segment + 1] - self._virtual[segment]) - inside)
            out[done : done + count] = self._tokens[start : start + count]
            done += count
            segment += 1

    def borders(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and column (from 1), in the result of `gather`, of each token that starts a document or follows the last one."""
        first, end = (self._document_ends.searchsorted(edge, side="right") for edge in (positions, positions + (length - 1)))
        counts = end - first
        rows = np.arange(len(positions)).repeat(counts)
        numbers = np.arange(len(rows)) + (first - (counts.cumsum() - counts))[rows]
        return rows, self._document_ends[numbers] - positions[rows]


class PackedDataset(torch.utils.data.Dataset):
    """Sequences of a stream; see the top of this file."""

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
        """All sequences of a micro-batch at once."""
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
    """The collate function of datasets that read a full micro-batch at once."""
    return batch


class DocumentDataset(torch.utils.data.Dataset):
    """One document per sequence of at most T + 1 tokens; a longer one continues in further sequences, so no target is lost."""

    varies_in_length = True
    """Batches are as long as their longest document."""

    def __init__(self, store: TokenStore, spans: np.ndarray, sequence_length: int) -> None:
        self._tokens = np.asarray(store.tokens)  # the same memory map, without the overhead of np.memmap per call
        starts, ends = spans.T
        counts = -(-np.maximum(0, ends - starts - 1) // sequence_length)
        first_sequence = np.repeat(np.cumsum(counts) - counts, counts)
        begins = np.repeat(starts, counts) + (np.arange(counts.sum()) - first_sequence) * sequence_length
        self._begins = begins
        self._ends = np.minimum(begins + sequence_length + 1, np.repeat(ends, counts))
        self.fingerprint = store.key

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Tensor:
        """Ids: int64, one to T + 1 of them."""
        return torch.from_numpy(self._tokens[self._begins[index] : self._ends[index]].astype(np.int64))


class PaddingCollator:
    """Pads documents to the longest one, with transformers' collator; padding is not trained on."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import DataCollatorForLanguageModeling

        # Some tokenizers pad on the left, where a decoder without a mask would attend to the padding.
        right_padding = copy.deepcopy(tokenizer)
        right_padding.padding_side = "right"
        self._collate = DataCollatorForLanguageModeling(right_padding, mlm=False)

    def __call__(self, documents: list[Tensor]) -> Batch:
        """A Batch of these documents. Padding is found by their lengths: the padding token may be the EOS, which is a target.

        The collator is given tensors, since it copies dictionaries token by token.
        """
        ids = self._collate(documents)["input_ids"]
        lengths = torch.tensor([len(document) for document in documents])
        is_padding = torch.arange(1, ids.shape[1]) >= lengths[:, None]
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(is_padding, IGNORED_TARGET))


class TruncatedDocuments(NamedTuple):
    """Documents, truncated to fit into sequences."""

    spans: np.ndarray
    """int64 [documents, 2]: [start, end) positions in the store, at most T + 1 tokens each, at least one of them trained on."""
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
    assert store.loss_mask is not None, "without a loss mask, all tokens are trained on"
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

    Sequences are numbered in the order of their first documents, or the longest documents would come first. A bit set of the
    free sizes that some sequence has finds the tightest fit in one operation.
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
