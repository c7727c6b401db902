"""How fast sequences are read: tokens per CPU second for micro-batches on one core, directly and through the loader.

python benchmarks/input_speed.py
"""

from __future__ import annotations

import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dist_trainer.config.schema import BatchConfig
from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.packing import (
    BestFitPackedDataset,
    DocumentDataset,
    PackedDataset,
    PaddingCollator,
    TokenStream,
    identity_collate,
    truncate_and_filter,
)
from dist_trainer.data.sampler import GlobalOrderSampler
from dist_trainer.data.token_store import TokenStore
from dist_trainer.data.tokenizers import load_tokenizer

TOKENS, ROUNDS, BATCHES = 50_000_000, 7, 200
DOCUMENT_TOKENS = 500
UNPACKED_TOKENS = 200
PACKED = ((256, 8), (1024, 32), (2048, 4))
UNPACKED = ((512, 8), (512, 32))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 4000, TOKENS, dtype=np.uint16).tofile(path)
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {TOKENS:,} tokens, {ROUNDS} rounds")
        print("| sequences | length | a batch | alone, Mtok/s (min to max) | through DataLoader, Mtok/s (min to max) |")
        print("|---|---|---|---|---|")
        for name, spans, apart in (
            ("packed", None, False),
            ("packed, one document of 20 left out", some_documents(), False),
            ("the same, with data.document_mask", some_documents(), True),
        ):
            stream = TokenStream(TokenStore(tokens, np.array([0, TOKENS]), "key"), spans)
            for length, sequences in PACKED:
                dataset = PackedDataset(stream, length, padding=0, fingerprint="", document_mask=apart)
                measure(name, dataset, length, sequences, identity_collate)
        spans = documents_of_about(UNPACKED_TOKENS)
        collate = PaddingCollator(load_tokenizer("austen"))
        for length, sequences in UNPACKED:
            dataset = DocumentDataset(TokenStore(tokens, np.append(spans[:, 0], spans[-1, 1]), "key"), spans, length)
            measure(f"a document of about {UNPACKED_TOKENS} tokens each", dataset, length, sequences, collate)
        store = TokenStore(tokens, np.append(spans[:, 0], spans[-1, 1]), "key", all_but_first_tokens(spans))
        for name, packing, apart, sizes in (
            ("whole documents with a loss mask, packed", True, False, PACKED),
            ("the same, with data.document_mask", True, True, PACKED),
            ("the same, one a sequence", False, False, UNPACKED),
        ):
            for length, sequences in sizes:
                kept = truncate_and_filter(store, spans, length).spans
                dataset = BestFitPackedDataset(store, kept, length, padding=0, packing=packing, document_mask=apart)
                measure(name, dataset, length, sequences, identity_collate)


def some_documents() -> np.ndarray:
    """Spans of equal documents, every twentieth left out, as if held out for validation."""
    starts = np.arange(0, TOKENS - DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    return np.stack([starts, starts + DOCUMENT_TOKENS], axis=1)[np.arange(len(starts)) % 20 != 7]


def all_but_first_tokens(spans: np.ndarray) -> np.ndarray:
    """A loss mask under which as many tokens count as with one document per sequence and no mask."""
    mask = np.ones(TOKENS, dtype=bool)
    mask[spans[:, 0]] = False
    return mask


def documents_of_about(tokens: int) -> np.ndarray:
    """Spans of documents with lengths spread evenly from 0.5 to 1.5 times `tokens`."""
    lengths = np.random.default_rng(1).integers(tokens // 2, tokens + tokens // 2, TOKENS // tokens)
    ends = lengths.cumsum()[lengths.cumsum() <= TOKENS]
    return np.stack([ends - lengths[: len(ends)], ends], axis=1)


def measure(name: str, dataset: Dataset, length: int, sequences: int, collate: Callable[[Any], Batch]) -> None:
    """Print a line of the table. Padding does not count."""
    sampler = GlobalOrderSampler(dataset, batch=BatchConfig(sequences, sequences), rank=0, world_size=1, seed=0)
    loader = DataLoader(dataset, batch_size=sequences, sampler=sampler, collate_fn=collate)
    order = list(itertools.islice(iter(sampler), sequences * BATCHES))
    indices = [order[start : start + sequences] for start in range(0, len(order), sequences)]
    counted = sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in itertools.islice(iter(loader), BATCHES))
    alone, whole = [], []
    for _ in range(ROUNDS):
        alone.append(counted / seconds_of(batches(dataset, indices, collate)) / 1e6)
        whole.append(counted / seconds_of(itertools.islice(iter(loader), BATCHES)) / 1e6)
    cells = (f"{statistics.median(m):.3g} ({min(m):.3g} to {max(m):.3g})" for m in (alone, whole))
    print(f"| {name} | {length} | {sequences} | {' | '.join(cells)} |", flush=True)


def batches(dataset: Any, indices: list[list[int]], collate: Callable[[Any], Batch]) -> Iterator[Batch]:
    """As the loader makes them."""
    for chosen in indices:
        fetched = dataset.__getitems__(chosen) if hasattr(dataset, "__getitems__") else [dataset[i] for i in chosen]
        yield collate(fetched)


def seconds_of(work: Iterable[Any]) -> float:
    begin = time.process_time()
    for _ in work:
        pass
    return time.process_time() - begin


if __name__ == "__main__":
    main()
