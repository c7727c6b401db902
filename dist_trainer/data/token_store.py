"""The token store: a split's token ids in one memory-mapped file, made once per content, under a lock.

A folder per content: tokens.bin (uint16, or uint32 for large vocabularies), offsets.npy (where documents begin, and the
end), index.json (with the digests of both). It is built under a hidden name and renamed when whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from dist_trainer.data.split import Split
from dist_trainer.data.template import TextOf
from dist_trainer.data.tokenization import Tokenizer, tokenizer_digest, vocabulary_size
from dist_trainer.errors import DataError

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
DTYPES = ("uint16", "uint32")
MOST_BYTES_VERIFIED = 1 << 32
"""Digests of larger files are not compared at each start: at some 2 GB a second that would take more than two seconds."""
_BUILDING = ".building-"
BATCH_PIECES = 1024
BATCH_CHARACTERS = 1 << 21
PIECE_CHARACTERS = 1 << 20
"""A longer document is tokenised in pieces, or a tokenizer would need a hundred times its size in memory."""
Border = Literal["with the next", "dropped", "none"]
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


@dataclass(frozen=True)
class TokenStore:
    """Token ids of documents, each with its EOS, one after the other."""

    tokens: np.ndarray
    """Memory map, uint16 or uint32."""
    offsets: np.ndarray
    """int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]."""
    key: str
    """Digest of content and tokenizer."""


def token_store(split: Split, tokenizer: Tokenizer, *, text: TextOf, text_identity: str, cache_dir: Path) -> TokenStore:
    """The store of `split`, opened, or built first where no process has before.

    `text_identity` tells apart what `text` may make of the same records. Raises DataError.
    """
    for name in ("tokens", "digests"):
        if (cache_dir / name).is_symlink():
            raise DataError(f"data.cache_dir: {cache_dir / name} is a symbolic link, which is not followed; remove it")
    try:
        (cache_dir / "tokens").mkdir(parents=True, exist_ok=True)
        content = split.digest(cache_dir / "digests")
        parts = [FORMAT_VERSION, content, text_identity, tokenizer_digest(tokenizer)]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        folder = cache_dir / "tokens" / key
        if (store := _open(folder, key)) is not None:
            return store
        _sweep(cache_dir / "tokens")
        with FileLock(_lock_of(folder)):
            if (store := _open(folder, key)) is not None:
                return store
            _build(folder, split, tokenizer, text)
        store = _open(folder, key)
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error or "its file system has no locks"
        raise DataError(
            f"data.cache_dir: {cache_dir} cannot be used ({reason}); make room there, or name another folder with "
            "--data.cache_dir or DIST_TRAINER_CACHE"
        ) from error
    if store is None:
        raise DataError(f"data.cache_dir: the token store in {folder} was damaged as soon as it was written")
    return store


def _lock_of(folder: Path) -> Path:
    """The lock file of the store `folder`; raises OSError where a link would lead the lock, which empties it, elsewhere."""
    lock = folder.with_name(f"{folder.name}.lock")
    if lock.is_symlink():
        raise OSError(errno.ELOOP, f"{lock} is a symbolic link, which is not followed", str(lock))
    return lock


def _sweep(stores: Path) -> None:
    """Remove what processes left that died while they built a store: no one holds its lock any more."""
    for half in stores.glob(f"{_BUILDING}*"):
        lock = FileLock(_lock_of(stores / half.name.removeprefix(_BUILDING)), timeout=0)
        with contextlib.suppress(Timeout, NotImplementedError), lock:
            _remove(half)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _open(folder: Path, key: str) -> TokenStore | None:
    """The store in `folder`; None where it is absent or not what its index says."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["dtype"] not in DTYPES or not _is_as_written(folder, index["digests"]):
            return None
        tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(index["dtype"]), mode="r")
        offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        whole = len(tokens) == index["tokens"] == offsets[-1] and len(offsets) == index["documents"] + 1
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return TokenStore(tokens, offsets, key) if whole else None


def _is_as_written(folder: Path, digests: dict[str, str]) -> bool:
    """Whether the files have the digests that the index names; of a very large one that would take minutes."""
    files = [folder / name for name in ("tokens.bin", "offsets.npy")]
    return all(path.stat().st_size > MOST_BYTES_VERIFIED or _digest(path) == digests[path.name] for path in files)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(folder: Path, split: Split, tokenizer: Tokenizer, text: TextOf) -> None:
    started = time.perf_counter()
    staging = folder.with_name(f"{_BUILDING}{folder.name}")
    for leftover in (staging, folder):
        _remove(leftover)
    staging.mkdir()
    try:
        num_tokens = _write_store(staging, split, tokenizer, text)
        os.rename(staging, folder)
    except BaseException:  # a full disk, a signal, a text that cannot be read
        _remove(staging)
        raise
    log.info("tokenised %s: %d tokens in %.1f s", split.description, num_tokens, time.perf_counter() - started)


def _write_store(staging: Path, split: Split, tokenizer: Tokenizer, text: TextOf) -> int:
    """Write the three files, and give the number of tokens in them."""
    dtype = np.dtype(DTYPES[0] if vocabulary_size(tokenizer) <= 1 << 16 else DTYPES[1])
    ends = [np.zeros(1, np.int64)]
    written = 0
    with (staging / "tokens.bin").open("wb") as file:
        for pieces in _tokenised(split, tokenizer, text):
            lengths = np.array([len(piece.ids) for piece in pieces], dtype=np.int64)
            file.write(np.fromiter((i for piece in pieces for i in piece.ids), dtype, int(lengths.sum())).tobytes())
            borders = written + lengths.cumsum()
            written = int(borders[-1])
            ends.append(borders[np.array([piece.ends_document for piece in pieces])])
        _sync(file)
    if not written:
        raise DataError(f"{split.description}: there is no text in it to learn from or to validate on; name other data")
    offsets = np.concatenate(ends)
    with (staging / "offsets.npy").open("wb") as file:
        np.save(file, offsets)
        _sync(file)
    index = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype.name,
        "tokens": written,
        "documents": len(offsets) - 1,
        "made_of": split.description,
        "digests": {name: _digest(staging / name) for name in ("tokens.bin", "offsets.npy")},
    }
    with (staging / "index.json").open("wb") as file:
        file.write(json.dumps(index, indent=2).encode())
        _sync(file)
    return written


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class TokenPiece(NamedTuple):
    """A document's ids, or those of a part of a long one; with EOS where the document ends."""

    ids: list[int]
    ends_document: bool


class TextPiece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool


def _tokenised(split: Split, tokenizer: Tokenizer, text: TextOf) -> Iterator[list[TokenPiece]]:
    """The ids of all documents in order, in batches; a document without text is left out."""
    end = [tokenizer.eos_token_id]
    with tqdm(desc="tokenising", unit="B", unit_scale=True, disable=None, leave=False) as progress:
        for pieces in _batches(_documents(split, text), border_of_pieces(tokenizer)):
            texts = [piece.text for piece in pieces]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            yield [
                TokenPiece(ids + end if piece.ends_document else ids, piece.ends_document)
                for ids, piece in zip(encoded["input_ids"], pieces, strict=True)
            ]
            progress.update(sum(map(len, texts)))


def _documents(split: Split, text: TextOf) -> Iterator[str]:
    for where, record in split.records():
        if document := text(where, record):
            _refuse_surrogates(where, document)
            yield document


def _batches(documents: Iterable[str], border: Border) -> Iterator[list[TextPiece]]:
    batch: list[TextPiece] = []
    characters = 0
    for document in documents:
        for piece in pieces_of(document, border):
            batch.append(piece)
            characters += len(piece.text)
            if len(batch) >= BATCH_PIECES or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def border_of_pieces(tokenizer: Tokenizer) -> Border:
    """Who gets the space between two words where a document is cut: the next piece, nobody (the tokenizer puts one before
    every text), or neither will do. Found by trying which gives the ids of the whole.
    """
    first, second = "the first words", "and then others"

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    whole = ids(f"{first} {second}")
    if whole == ids(first) + ids(f" {second}"):
        return "with the next"
    return "dropped" if whole == ids(first) + ids(second) else "none"


def pieces_of(document: str, border: Border = "with the next") -> Iterator[TextPiece]:
    """The document; or, of a long one, pieces that end between two words, where tokens end anyway, if there is such a place."""
    start = 0
    while len(document) - start > PIECE_CHARACTERS and (cut := _cut(document, start, border)) is not None:
        yield TextPiece(document[start:cut], ends_document=False)
        start = cut + 1 if border == "dropped" else cut
    yield TextPiece(document[start:], ends_document=True)


def _cut(document: str, start: int, border: Border) -> int | None:
    """Where the piece that begins at `start` ends: the last place between words of about PIECE_CHARACTERS."""
    if border == "none":
        return None
    limit = start + PIECE_CHARACTERS
    places = [match.start() for match in _BETWEEN_WORDS.finditer(document, limit - PIECE_CHARACTERS // 8, limit)]
    if places or border == "with the next":
        return places[-1] if places else limit
    later = _BETWEEN_WORDS.search(document, limit)  # no space, no cut: one would appear there
    return later.start() if later else None


def _refuse_surrogates(where: str, document: str) -> None:
    """JSON can hold halves of characters, as careless cutting leaves them; no tokenizer takes them."""
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a character (a lone surrogate, {document[error.start]!a}) at place {error.start} of the text; "
            "remove it"
        ) from error
