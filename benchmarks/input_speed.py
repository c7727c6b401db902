"""How fast packed rows are read: tokens a second of whole micro-batches on one core, loader included.

python benchmarks/input_speed.py
"""

from __future__ import annotations

import itertools
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dist_trainer.config.schema import BatchConfig
from dist_trainer.data.loader import as_it_is
from dist_trainer.data.packing import PackedRows, TokenStream
from dist_trainer.data.sampler import GlobalOrderSampler
from dist_trainer.data.token_store import TokenStore

TOKENS, ROUNDS, BATCHES = 50_000_000, 7, 200


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 50_000, TOKENS, dtype=np.uint16).tofile(path)
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        stream = TokenStream(TokenStore(tokens, np.array([0, TOKENS]), "key"))
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {TOKENS:,} tokens, {ROUNDS} rounds")
        print("| row length | rows a batch | gather, Mtok/s (min to max) | through DataLoader, Mtok/s (min to max) |")
        print("|---|---|---|---|")
        for length, rows in ((256, 8), (1024, 32), (2048, 4)):
            dataset = PackedRows(stream, length, padding=0, fingerprint="")
            sampler = GlobalOrderSampler(dataset, batch=BatchConfig(rows, rows), rank=0, world_size=1, seed=0)
            loader = torch.utils.data.DataLoader(dataset, batch_size=rows, sampler=sampler, collate_fn=as_it_is)
            batches = list(itertools.islice(iter(sampler), rows * BATCHES))
            indices = [batches[start : start + rows] for start in range(0, len(batches), rows)]
            gather, whole = [], []
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                for chosen in indices:
                    dataset.__getitems__(chosen)
                gather.append(len(indices) * rows * length / (time.perf_counter() - begin) / 1e6)
                begin = time.perf_counter()
                for _ in itertools.islice(iter(loader), BATCHES):
                    pass
                whole.append(BATCHES * rows * length / (time.perf_counter() - begin) / 1e6)
            cells = (f"{statistics.median(m):.0f} ({min(m):.0f} to {max(m):.0f})" for m in (gather, whole))
            print(f"| {length} | {rows} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
