"""The token store: a split's token ids in one memory-mapped file, made once per content, under a lock.

A folder per content: tokens.bin (uint16, or uint32 for large vocabularies), offsets.npy (where documents begin, and the
end), index.json (with the digests of the others), and loss.bin (a byte a token: 1 where it carries loss) if only parts of the
documents do. It is built under a hidden name (store_building.py) and renamed when whole.
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
from dist_trainer.data.store_building import (
    DTYPES,
    FORMAT_VERSION,
    LOSS_MASK,
    build_store,
    digest_of,
    remove,
    seconds_since_progress,
)
from dist_trainer.data.templates import TextOf
from dist_trainer.data.tokenizers import Tokenizer, tokenizer_digest
from dist_trainer.errors import DataError, StoppedError, counted
from dist_trainer.storage.locks import locked, try_lock, unlock

log = logging.getLogger(__name__)

MOST_BYTES_VERIFIED = 1 << 32
"""Digests of larger files are not compared at each start: at some 2 GB a second that would take more than two seconds."""
_BUILDING = ".building-"
SECONDS_KEPT = 7 * 24 * 3600.0
"""So long a build that was killed waits for its command to be given again."""


@dataclass(frozen=True)
class TokenStore:
    """Token ids of documents, each with its EOS, one after the other."""

    tokens: np.ndarray
    """Memory map, uint16 or uint32."""
    offsets: np.ndarray
    """int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]."""
    key: str
    """Digest of content and tokenizer."""
    loss_mask: np.ndarray | None = None
    """Memory map, bool: which tokens carry loss; None: all do. No document's first token does."""
    skipped_records: int = 0
    """How many records could not be read or used."""


def token_store(
    split: Split,
    tokenizer: Tokenizer,
    *,
    text: TextOf,
    text_identity: str,
    cache_dir: Path,
    has_loss_mask: bool = False,
    max_bad_records: int = 0,
) -> TokenStore:
    """The store of `split`, opened, or built first where no process has before.

    `text_identity` tells apart what `text` may make of one record; `has_loss_mask`: these are LossMaskedTexts, so there is
    a loss mask too; `max_bad_records`: so many that cannot be read or used are skipped. Raises DataError.
    """
    for name in ("tokens", "digests"):
        if (cache_dir / name).is_symlink():
            raise DataError(f"data.cache_dir: {cache_dir / name} is a symbolic link, which is not followed; remove it")
    try:
        (cache_dir / "tokens").mkdir(parents=True, exist_ok=True)
        key = store_key(split, tokenizer, text_identity, cache_dir, max_bad_records)
        folder = cache_dir / "tokens" / key
        if (store := _open(folder, key, has_loss_mask=has_loss_mask)) is not None:
            if store.skipped_records:
                log.warning(
                    "%s: %s skipped when it was tokenised (data.bad_records)",
                    split.description,
                    counted(store.skipped_records, "record"),
                )
            return store
        _sweep(cache_dir / "tokens")
        with locked(_lock_of(folder), without_locks="start no second run on the same data while its tokens are prepared"):
            if (store := _open(folder, key, has_loss_mask=has_loss_mask)) is not None:
                return store
            _build(folder, split, tokenizer, text, has_loss_mask, max_bad_records)
        store = _open(folder, key, has_loss_mask=has_loss_mask)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"data.cache_dir: {cache_dir} cannot be used ({reason}); make room there, or name another folder with "
            "--data.cache_dir or DIST_TRAINER_CACHE"
        ) from error
    if store is None:
        raise DataError(f"data.cache_dir: the token store in {folder} was damaged as soon as it was written")
    return store


def store_key(split: Split, tokenizer: Tokenizer, text_identity: str, cache_dir: Path, max_bad_records: int) -> str:
    """The key of the store that `token_store` gives, without building it. Raises DataError."""
    parts = [FORMAT_VERSION, split.digest(cache_dir / "digests"), text_identity, tokenizer_digest(tokenizer)]
    if max_bad_records:
        parts.append(f"without {max_bad_records} bad records at most")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _lock_of(folder: Path) -> Path:
    """The lock file of the store `folder`; raises OSError where a link would lead the lock elsewhere."""
    lock = folder.with_name(f"{folder.name}.lock")
    if lock.is_symlink():
        raise OSError(errno.ELOOP, f"{lock} is a symbolic link, which is not followed", str(lock))
    return lock


def _sweep(stores: Path) -> None:
    """Remove what processes left that died while they built a store, if no one has gone on with it for so long, or could."""
    for half in stores.glob(f"{_BUILDING}*"):
        if seconds_since_progress(half) < SECONDS_KEPT:
            continue
        with contextlib.suppress(OSError):
            if (lock := try_lock(_lock_of(stores / half.name.removeprefix(_BUILDING)))) is not None:
                remove(half)
                unlock(lock)


def _open(folder: Path, key: str, *, has_loss_mask: bool) -> TokenStore | None:
    """The store in `folder`; None where it is absent or not what its index says."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["dtype"] not in DTYPES or not _is_as_written(folder, index["digests"], has_loss_mask):
            return None
        tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(index["dtype"]), mode="r")
        offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        whole = len(tokens) == index["tokens"] == offsets[-1] and len(offsets) == index["documents"] + 1
        loss_mask = np.memmap(folder / LOSS_MASK, dtype=bool, mode="r") if has_loss_mask else None
        whole = whole and (loss_mask is None or len(loss_mask) == len(tokens))
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return TokenStore(tokens, offsets, key, loss_mask, index.get("skipped_records", 0)) if whole else None


def _is_as_written(folder: Path, digests: dict[str, str], has_loss_mask: bool) -> bool:
    """Whether the files have the digests that the index names; of a very large one that would take minutes."""
    files = [folder / name for name in ("tokens.bin", "offsets.npy", *([LOSS_MASK] if has_loss_mask else []))]
    return all(path.stat().st_size > MOST_BYTES_VERIFIED or digest_of(path) == digests[path.name] for path in files)


def _build(folder: Path, split: Split, tokenizer: Tokenizer, text: TextOf, has_loss_mask: bool, max_bad_records: int) -> None:
    started = time.perf_counter()
    staging = folder.with_name(f"{_BUILDING}{folder.name}")
    remove(folder)
    if staging.is_symlink():
        remove(staging)
    staging.mkdir(exist_ok=True)
    try:
        num_tokens = build_store(staging, split, tokenizer, text, has_loss_mask=has_loss_mask, max_bad_records=max_bad_records)
        os.rename(staging, folder)
    except (StoppedError, KeyboardInterrupt, SystemExit):
        raise  # what is written stays: the next build goes on from it
    except BaseException:  # a full disk, a text that cannot be read
        remove(staging)
        raise
    log.info("tokenised %s: %s in %.1f s", split.description, counted(num_tokens, "token"), time.perf_counter() - started)
