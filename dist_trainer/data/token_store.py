"""The token store: a split's token ids in one memory-mapped file, made once per content, under a lock.

A folder per content: tokens.bin (uint16, or uint32 for large vocabularies), offsets.npy (where documents begin, and the
end), index.json. It is built under a hidden name and renamed when whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from dist_trainer.data.split import Split
from dist_trainer.data.template import TextOf
from dist_trainer.data.tokenization import Tokenizer, tokenizer_digest, vocabulary_size
from dist_trainer.errors import DataError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class TokenStore:
    """Token ids of documents, each with its EOS, one after the other."""

    tokens: np.ndarray
    """Memory map, uint16 or uint32."""
    offsets: np.ndarray
    """int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]."""
    key: str
    """Digest of content and tokenizer."""


def default_cache_dir() -> Path:
    """DIST_TRAINER_CACHE, else dist_trainer/ in the user's cache folder."""
    if named := os.environ.get("DIST_TRAINER_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_trainer"


def token_store(split: Split, tokenizer: Tokenizer, *, text: TextOf, text_identity: str, cache_dir: Path) -> TokenStore:
    """The store of `split`, opened, or built first where no process has before.

    `text_identity` tells apart what `text` may make of the same records. Raises DataError.
    """
    try:
        (cache_dir / "tokens").mkdir(parents=True, exist_ok=True)
        content = split.digest(cache_dir / "digests")
        parts = [FORMAT_VERSION, content, text_identity, tokenizer_digest(tokenizer)]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        folder = cache_dir / "tokens" / key
        if (store := _open(folder, key)) is not None:
            return store
        with FileLock(f"{folder}.lock"):
            if (store := _open(folder, key)) is not None:
                return store
            _build(folder, split, tokenizer, text)
        store = _open(folder, key)
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {cache_dir} cannot be used ({error.strerror or error}); name another folder with "
            "--data.cache_dir or DIST_TRAINER_CACHE"
        ) from error
    if store is None:
        raise DataError(f"data.cache_dir: the token store in {folder} was damaged as soon as it was written")
    return store


def _open(folder: Path, key: str) -> TokenStore | None:
    """The store in `folder`; None where it is absent or not what its index says."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(index["dtype"]), mode="r")
        offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        whole = len(tokens) == index["tokens"] == offsets[-1] and len(offsets) == index["documents"] + 1
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return TokenStore(tokens, offsets, key) if whole else None


def _build(folder: Path, split: Split, tokenizer: Tokenizer, text: TextOf) -> None:
    started = time.perf_counter()
    staging = folder.with_name(f".building-{folder.name}")
    for leftover in (staging, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir()
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)
    lengths: list[np.ndarray] = []
    with (staging / "tokens.bin").open("wb") as file:
        for documents in _tokenised(split, tokenizer, text):
            lengths.append(np.array([len(ids) for ids in documents], dtype=np.int64))
            file.write(np.fromiter((i for ids in documents for i in ids), dtype, int(lengths[-1].sum())).tobytes())
        _sync(file.fileno())
    if not lengths:
        raise DataError(f"{split.description}: there is no text in it")
    offsets = np.concatenate([[0], *lengths]).cumsum()
    with (staging / "offsets.npy").open("wb") as file:
        np.save(file, offsets)
        _sync(file.fileno())
    index = {"format_version": FORMAT_VERSION, "dtype": dtype.name, "tokens": int(offsets[-1])}
    with (staging / "index.json").open("w", encoding="utf-8") as index_file:
        json.dump({**index, "documents": len(offsets) - 1, "made_of": split.description}, index_file, indent=2)
        _sync(index_file.fileno())
    os.rename(staging, folder)
    seconds = time.perf_counter() - started
    log.info("tokenised %s: %d tokens in %.1f s", split.description, offsets[-1], seconds)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _tokenised(split: Split, tokenizer: Tokenizer, text: TextOf) -> Iterator[list[list[int]]]:
    """Documents' ids with EOS, in batches; a document without text is left out."""
    end = [tokenizer.eos_token_id]
    with tqdm(desc="tokenising", unit="B", unit_scale=True, disable=None, leave=False) as progress:
        for texts in _batches(split, text):
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            yield [ids + end for ids in encoded["input_ids"]]
            progress.update(sum(map(len, texts)))


def _batches(split: Split, text: TextOf) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for where, record in split.records():
        document = text(where, record)
        if not document:
            continue
        _refuse_surrogates(where, document)
        batch.append(document)
        characters += len(document)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _refuse_surrogates(where: str, document: str) -> None:
    """JSON can hold halves of characters, as careless cutting leaves them; no tokenizer takes them."""
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a character (a lone surrogate, {document[error.start]!a}) at place {error.start} of the text; "
            "remove it"
        ) from error
