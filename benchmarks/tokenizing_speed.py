"""Text to token ids on disk, from a cold start: the token store compared with `datasets.map` and a fast Hugging Face tokenizer.

python benchmarks/tokenizing_speed.py [--text FILE.jsonl ...] [--tokenizer FOLDER] [--rounds 5]

Each measurement is a separate process with empty caches; contestants alternate. `seconds` start when the tokenizer is loaded
and the text is not yet read (for datasets.map: when the text is already an Arrow table) and end when the ids are on disk.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from dist_trainer.config.schema import DataConfig
from dist_trainer.data import store_building
from dist_trainer.data.datasets import CORPUS, files_split
from dist_trainer.data.templates import RecordFormatter, text_formatter
from dist_trainer.data.token_store import token_store
from dist_trainer.data.tokenizers import load_tokenizer

TRAINED_ON = 16_000_000
"""Characters of the text that the benchmark's own tokenizer learns its merges from."""


def ours(text: Path, tokenizer: Path, folder: Path) -> tuple[float, np.ndarray]:
    loaded = load_tokenizer(str(tokenizer))
    begin = time.perf_counter()
    split = files_split([text], DataConfig())
    store = token_store(split, loaded, RecordFormatter(text_formatter("text", None), ""), cache_dir=folder)
    return time.perf_counter() - begin, np.asarray(store.tokens)


def ours_without_gigatoken(text: Path, tokenizer: Path, folder: Path) -> tuple[float, np.ndarray]:
    with mock.patch.object(store_building, "fast_encoder", return_value=None):
        return ours(text, tokenizer, folder)


def datasets_map(text: Path, tokenizer: Path, folder: Path) -> tuple[float, np.ndarray]:
    import datasets

    loaded = load_tokenizer(str(tokenizer))
    table = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder))

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": loaded(batch["text"], add_special_tokens=False)["input_ids"]}

    begin = time.perf_counter()
    tokenised = table.map(tokenise, batched=True, num_proc=2, remove_columns=table.column_names)
    seconds = time.perf_counter() - begin
    end = [loaded.eos_token_id]
    return seconds, np.concatenate([np.array(row["ids"] + end) for row in tokenised])


CONTESTANTS: dict[str, Callable[[Path, Path, Path], tuple[float, np.ndarray]]] = {
    "datasets.map, 2 processes": datasets_map,
    "ours, Hugging Face's tokenizer": ours_without_gigatoken,
    "ours": ours,
}


def measure(name: str, text: Path, tokenizer: Path) -> None:
    """Measure one contestant, in this process; prints the result as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, tokens = CONTESTANTS[name](text, tokenizer, Path(folder))
        digest = hashlib.sha256(tokens.astype(np.uint32).tobytes()).hexdigest()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "tokens": len(tokens), "digest": digest, "peak_mib": peak}))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument(
        "--text", type=Path, nargs="+", help='JSONL with a column "text"; default: the corpus inside the package'
    )
    arguments.add_argument("--tokenizer", type=Path, help="a folder; default: a GPT-2-like one trained on the text")
    arguments.add_argument("--vocabulary", type=int, default=32_000, help="entries of the trained tokenizer")
    arguments.add_argument(
        "--megabytes", type=int, default=32, help="of the default text, its paragraphs shuffled and repeated"
    )
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.contestant:
        measure(chosen.contestant, chosen.text[0], chosen.tokenizer)
        return
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        if chosen.text:
            text.write_bytes(b"".join(path.read_bytes() for path in chosen.text))
        else:
            write_shuffled_corpus(text, chosen.megabytes * 1_000_000)
        tokenizer = chosen.tokenizer or train_tokenizer(text, Path(folder) / "tokenizer", chosen.vocabulary)
        compare(text, tokenizer, chosen.rounds)


def compare(text: Path, tokenizer: Path, rounds: int) -> None:
    results: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, measured in results.items():
            command = [sys.executable, __file__, "--contestant", name, "--text", str(text), "--tokenizer", str(tokenizer)]
            begin = time.perf_counter()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            whole = time.perf_counter() - begin
            measured.append(json.loads(done.stdout.splitlines()[-1]) | {"whole": whole})
    digests = {result["digest"] for measured in results.values() for result in measured}
    if len(digests) != 1:
        raise SystemExit("the contestants gave different ids")
    megabytes = sum(len(json.loads(line)["text"].encode()) for line in text.open(encoding="utf-8")) / 1e6
    base, *_ = results.values()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{megabytes:.1f} MB of text, {base[0]['tokens']:,} tokens, {rounds} rounds, the same ids from all")
    print("| | MB/s (min to max) | times datasets.map (min to max) | whole process, s | peak MiB |")
    print("|---|---|---|---|---|")
    for name, measured in results.items():
        speeds = [megabytes / result["seconds"] for result in measured]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(base, measured, strict=True)]
        whole, peak = (statistics.median(result[key] for result in measured) for key in ("whole", "peak_mib"))
        print(f"| {name} | {spread(speeds)} | {spread(ratios)} | {whole:.1f} | {peak:.0f} |")


def spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.1f} ({min(numbers):.1f} to {max(numbers):.1f})"


def write_shuffled_corpus(path: Path, num_bytes: int) -> None:
    """Write paragraphs of the built-in corpus in random order, about 2 KB per document."""
    with gzip.open(CORPUS / "austen_train.jsonl.gz", "rt", encoding="utf-8") as file:
        paragraphs = [paragraph for line in file for paragraph in json.loads(line)["text"].split("\n\n")]
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            chance.shuffle(paragraphs)
            for start in range(0, len(paragraphs), 8):
                file.write(json.dumps({"text": "\n\n".join(paragraphs[start : start + 8])}) + "\n")


def train_tokenizer(text: Path, folder: Path, vocabulary: int) -> Path:
    """A byte-level BPE with GPT-2's rules."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with text.open(encoding="utf-8") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in file.readlines(TRAINED_ON)), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
