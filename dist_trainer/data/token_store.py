"""The token store: a split's token ids in a memory-mapped file, built once per content, under a lock.

There is one folder per content: tokens.bin (uint16, or uint32 for large vocabularies), offsets.npy (where documents start, and
the end of the last), index.json (with the digests of the other files), and, with a loss mask, loss.bin (a byte per token: 1 if
it is trained on). A store is built in a hidden folder (store_building.py) and renamed when complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_trainer.data.split import Split
from dist_trainer.data.store_building import DTYPES, FORMAT_VERSION, JOINED, LOSS_MASK, build_store
from dist_trainer.data.templates import RecordFormatter
from dist_trainer.data.tokenizers import Tokenizer, tokenizer_digest
from dist_trainer.errors import DataError, StoppedError, counted
from dist_trainer.storage.files import remove, sync
from dist_trainer.storage.locks import locked, try_lock, unlock
from dist_trainer.storage.manifest import digest_of_file

log = logging.getLogger(__name__)

MAX_BYTES_VERIFIED = 1 << 32
"""Digests of larger files are not checked at each start: at some 2 GB/s that would take more than two seconds."""
BUILDING_PREFIX = ".building-"
SECONDS_KEPT = 7 * 24 * 3600.0
"""How long the shards of an interrupted build are kept."""


@dataclass(frozen=True)
class TokenStore:
    """Token ids of documents, concatenated, each with its EOS."""

    tokens: np.ndarray
    """Memory map, uint16 or uint32."""
    offsets: np.ndarray
    """int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]."""
    key: str
    """Digest of content and tokenizer."""
    loss_mask: np.ndarray | None = None
    """Memory map, bool: which tokens are trained on (never a document's first); None: all."""
    skipped_records: int = 0
    """How many records could not be read or used."""


def token_store(
    split: Split, tokenizer: Tokenizer, formatter: RecordFormatter, *, cache_dir: Path, max_bad_records: int = 0
) -> TokenStore:
    """The store of `split`, built if there is none. Up to `max_bad_records` unreadable or unusable records are skipped.

    Raises DataError.
    """
    for name in ("tokens", "digests"):
        if (cache_dir / name).is_symlink():
            raise DataError(f"data.cache_dir: {cache_dir / name} is a symbolic link, which is not followed; remove it")
    has_loss_mask = formatter.has_loss_mask
    try:
        (cache_dir / "tokens").mkdir(parents=True, exist_ok=True)
        key = store_key(split, tokenizer, formatter.identity, cache_dir, max_bad_records)
        folder = cache_dir / "tokens" / key
        if (store := _open(folder, key, has_loss_mask=has_loss_mask)) is not None:
            if store.skipped_records:
                log.warning(
                    "%s: %s skipped when it was tokenised (data.bad_records)",
                    split.description,
                    counted(store.skipped_records, "record"),
                )
            return store
        _remove_abandoned(cache_dir / "tokens")
        with locked(_lock_path(folder), without_locks="start no second run on the same data while its tokens are prepared"):
            if (store := _open(folder, key, has_loss_mask=has_loss_mask)) is not None:
                return store
            _build(folder, split, tokenizer, formatter, max_bad_records)
        store = _open(folder, key, has_loss_mask=has_loss_mask)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"data.cache_dir: {cache_dir} cannot be used ({reason}); free some space, or choose another folder with "
            "--data.cache_dir or DIST_TRAINER_CACHE"
        ) from error
    if store is None:
        raise DataError(f"data.cache_dir: the token store in {folder} was damaged as soon as it was written")
    return store


def store_key(split: Split, tokenizer: Tokenizer, text_identity: str, cache_dir: Path, max_bad_records: int) -> str:
    """The key of the store that `token_store` returns, without building it. Raises DataError."""
    parts = [FORMAT_VERSION, split.digest(cache_dir / "digests"), text_identity, tokenizer_digest(tokenizer)]
    if max_bad_records:
        parts.append(f"without {max_bad_records} bad records at most")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _lock_path(folder: Path) -> Path:
    """The lock file of the store `folder`. Raises OSError if it is a symbolic link."""
    lock = folder.with_name(f"{folder.name}.lock")
    if lock.is_symlink():
        raise OSError(errno.ELOOP, f"{lock} is a symbolic link, which is not followed", str(lock))
    return lock


def _remove_abandoned(stores: Path) -> None:
    """Remove the remains of interrupted builds to which no shard was added for SECONDS_KEPT."""
    for staging in stores.glob(f"{BUILDING_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - staging.lstat().st_mtime < SECONDS_KEPT:
                continue
            if (lock := try_lock(_lock_path(stores / staging.name.removeprefix(BUILDING_PREFIX)))) is not None:
                remove(staging)
                unlock(lock)


def _open(folder: Path, key: str, *, has_loss_mask: bool) -> TokenStore | None:
    """The store in `folder`; None if it is absent or damaged."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["dtype"] not in DTYPES or not _has_digests(folder, index["digests"], has_loss_mask):
            return None
        tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(index["dtype"]), mode="r")
        offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        is_valid = len(tokens) == index["tokens"] == offsets[-1] and len(offsets) == index["documents"] + 1
        loss_mask = np.memmap(folder / LOSS_MASK, dtype=bool, mode="r") if has_loss_mask else None
        is_valid = is_valid and (loss_mask is None or len(loss_mask) == len(tokens))
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return TokenStore(tokens, offsets, key, loss_mask, index.get("skipped_records", 0)) if is_valid else None


def _has_digests(folder: Path, digests: dict[str, str], has_loss_mask: bool) -> bool:
    """Whether the files have these digests; very large files are not checked."""
    files = [folder / name for name in ("tokens.bin", "offsets.npy", *([LOSS_MASK] if has_loss_mask else []))]
    return all(path.stat().st_size > MAX_BYTES_VERIFIED or digest_of_file(path) == digests[path.name] for path in files)


def _build(folder: Path, split: Split, tokenizer: Tokenizer, formatter: RecordFormatter, max_bad_records: int) -> None:
    started = time.perf_counter()
    staging = folder.with_name(f"{BUILDING_PREFIX}{folder.name}")
    remove(folder)
    if staging.is_symlink():
        remove(staging)
    staging.mkdir(exist_ok=True)
    try:
        num_tokens = build_store(staging, split, tokenizer, formatter, max_bad_records)
        os.rename(staging / JOINED, folder)
        sync(folder.parent)
    except (StoppedError, KeyboardInterrupt, SystemExit):
        raise  # the shards are kept for the next build
    except BaseException:  # a full disk, a text that cannot be read
        remove(staging)
        raise
    remove(staging)
    log.info("tokenised %s: %s in %.1f s", split.description, counted(num_tokens, "token"), time.perf_counter() - started)
