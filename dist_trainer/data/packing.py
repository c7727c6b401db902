"""Rows of tokens from documents: packed, or one document a row. T is data.sequence_length.

Packed, the documents of a split are one long stream of N tokens (each document ends with EOS), and row i is the T + 1
tokens from i * T on: its first T are what the model reads, its last T what it should have said. So every token but the
very first is a target exactly once; only the last row is padded.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.token_store import TokenStore


class TokenStream:
    """Some documents of a store, end to end, in the store's order."""

    def __init__(self, store: TokenStore, spans: np.ndarray | None = None) -> None:
        """`spans` [documents, 2] are [start, end) token positions in the store, ascending. None: everything."""
        starts, ends = np.array([[0, len(store.tokens)]] if spans is None else spans, dtype=np.int64).reshape(-1, 2).T
        begins_anew = np.append(True, starts[1:] != ends[:-1])[: len(starts)]  # where the one before does not end
        self._tokens = store.tokens
        self._starts = starts[begins_anew]
        lengths = np.add.reduceat(ends - starts, np.flatnonzero(begins_anew)) if len(starts) else []
        self._virtual = np.concatenate([[0], lengths]).cumsum().astype(np.int64)

    def __len__(self) -> int:
        return int(self._virtual[-1])

    def read_into(self, out: np.ndarray, position: int) -> int:
        """Copy tokens from `position` on into `out`, as far as there are any; how many there were."""
        wanted = min(len(out), len(self) - position)
        done = 0
        segment = int(np.searchsorted(self._virtual, position, side="right")) - 1
        while done < wanted:
            inside = position + done - int(self._virtual[segment])
            available = int(self._virtual[segment + 1] - self._virtual[segment]) - inside
            count = min(wanted - done, available)
            start = int(self._starts[segment]) + inside
            out[done : done + count] = self._tokens[start : start + count]
            done += count
            segment += 1
        return wanted


class PackedRows(torch.utils.data.Dataset):
    """Rows of a stream; see the top of this file."""

    def __init__(self, stream: TokenStream, sequence_length: int, *, padding: int, fingerprint: str) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self.padding = padding
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return -(-max(0, len(self.stream) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """All rows of a micro-batch at once."""
        rows = np.full((len(indices), self.sequence_length + 1), self.padding, dtype=np.int64)
        counts = [self.stream.read_into(row, index * self.sequence_length) for row, index in zip(rows, indices, strict=True)]
        both = torch.from_numpy(rows)
        # Copies, also of a single row, whose slices would count as contiguous and share their memory.
        tokens, targets = (part.clone(memory_format=torch.contiguous_format) for part in (both[:, :-1], both[:, 1:]))
        for number, count in enumerate(counts):
            if count <= self.sequence_length:
                targets[number, max(0, count - 1) :] = IGNORED_TARGET
        return Batch(tokens, targets)


def as_it_is(batch: Batch) -> Batch:
    """The collate function of PackedRows, which read a whole micro-batch at once."""
    return batch


class DocumentRows(torch.utils.data.Dataset):
    """One document a row, of at most T + 1 tokens; a longer one goes on in further rows, so that no target is lost."""

    def __init__(self, store: TokenStore, spans: np.ndarray, sequence_length: int) -> None:
        self._tokens = store.tokens
        starts, ends = spans.T
        rows = -(-np.maximum(0, ends - starts - 1) // sequence_length)
        first_row = np.repeat(np.cumsum(rows) - rows, rows)
        begins = np.repeat(starts, rows) + (np.arange(rows.sum()) - first_row) * sequence_length
        self._begins = begins
        self._ends = np.minimum(begins + sequence_length + 1, np.repeat(ends, rows))
        self.fingerprint = store.key

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self._tokens[self._begins[index] : self._ends[index]]
        return {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)}


class PaddingCollator:
    """Pads documents to the longest of them, through transformers' own collator; padding carries no loss."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import DataCollatorForLanguageModeling

        # Some published tokenizers pad on the left, where a decoder without a mask would attend to it.
        on_the_right = copy.deepcopy(tokenizer)
        on_the_right.padding_side = "right"
        self._collate = DataCollatorForLanguageModeling(on_the_right, mlm=False)

    def __call__(self, rows: list[dict[str, list[int]]]) -> Batch:
        """A Batch of rows; the mask tells padding, for the padding token may be the EOS, which does count."""
        padded = self._collate(rows)
        ids, mask = padded["input_ids"], padded["attention_mask"]
        targets = ids.masked_fill(mask == 0, IGNORED_TARGET)
        return Batch(ids[:, :-1].contiguous(), targets[:, 1:].contiguous())
