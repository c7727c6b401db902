"""Builds a token store from shards, so that a killed build resumes after the shards it has completed.

The text is divided into shards of about SHARD_CHARACTERS characters (text_pieces.py), which depend only on the text. Each is
tokenised by itself, written to `shard-000000.npz` in the folder of the build, and renamed when complete; a build skips those
that exist. The store is its shards, joined in order. A piece's ids depend on no other piece, so the store's bytes are the same
however often the build was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dist_trainer.data.encoding import (
    EncodedPieces,
    Encoder,
    HuggingFaceEncoder,
    TokenizerMismatchError,
    encode,
    encode_with_loss_masks,
    fast_encoder,
)
from dist_trainer.data.split import Split
from dist_trainer.data.templates import RecordFormatter
from dist_trainer.data.text_pieces import BadRecords, detect_border, in_batches, shard_layout, text_pieces
from dist_trainer.data.tokenizers import Tokenizer, text_prefix, vocabulary_size
from dist_trainer.errors import DataError
from dist_trainer.storage.files import remove, replace_file, sync
from dist_trainer.storage.manifest import digest_of_file

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
DTYPES = ("uint16", "uint32")
LOSS_MASK = "loss.bin"
JOINED = "store"
"""Subfolder of the build in which the shards are joined."""
WITHOUT_GIGATOKEN = "without_gigatoken"
"""A file that marks a build for which gigatoken gave wrong ids."""
SECONDS_BETWEEN_LINES = 30.0
"""How often progress is logged if there is no terminal for a bar."""


class Shard(NamedTuple):
    """The ids of consecutive pieces of text."""

    tokens: np.ndarray
    """uint16 or uint32, with an EOS after each document that ends here."""
    ends: np.ndarray
    """int64: the position after each document that ends here, counted from the shard's first token."""
    loss_mask: np.ndarray
    """bool [tokens] if the store has a loss mask, else empty."""
    text_bytes: int
    layout: str
    """How the text was divided into pieces and shards; see `shard_layout`."""


def build_store(staging: Path, split: Split, tokenizer: Tokenizer, formatter: RecordFormatter, max_bad_records: int = 0) -> int:
    """Write the files of a store into `staging`/store, and return the number of tokens.

    Skips the shards that an earlier build left in the folder `staging`. Raises DataError, OSError.
    """
    own = HuggingFaceEncoder(tokenizer)

    def write(encoder: Encoder | None) -> int:
        return _write_store(staging, split, tokenizer, formatter, encoder, own, BadRecords(max_bad_records))

    if formatter.has_loss_mask:
        return write(None)
    fast = None if (staging / WITHOUT_GIGATOKEN).exists() else fast_encoder(tokenizer)
    if fast is not None:
        try:
            return write(fast)
        except TokenizerMismatchError as error:
            log.warning("tokenising %s again, with the tokenizer itself: %s", split.description, error)
        # Remove the shards first: a build killed in between must not keep any of them.
        for path in staging.glob("shard-*"):
            path.unlink()
        (staging / WITHOUT_GIGATOKEN).touch()
    return write(own)


def _write_store(
    staging: Path,
    split: Split,
    tokenizer: Tokenizer,
    formatter: RecordFormatter,
    encoder: Encoder | None,
    own: Encoder,
    bad_records: BadRecords,
) -> int:
    """Write the missing shards, join all, and return the number of tokens. Texts with loss masks need no `encoder`."""
    dtype = np.dtype(DTYPES[0] if vocabulary_size(tokenizer) <= 1 << 16 else DTYPES[1])
    border = detect_border(tokenizer)
    layout = shard_layout(border)
    complete = _complete_shards(staging, layout)
    resumed_bytes = sum(complete.values())
    if complete:
        log.info("tokenising %s: resuming after %.1f MB of text", split.description, resumed_bytes / 1e6)
    batches = in_batches(text_pieces(split, formatter.text, border, bad_records))
    missing = (batch for batch in batches if batch.shard not in complete)
    if encoder is None:
        encoded = encode_with_loss_masks(missing, tokenizer)
    else:
        encoded = encode(missing, encoder, own, text_prefix(tokenizer))
    numbers = list(complete)
    with contextlib.closing(encoded), contextlib.closing(_Display(split.description, resumed_bytes)) as display:
        for number, of_shard in itertools.groupby(encoded, key=lambda batch: batch.shard):
            shard = _build_shard(of_shard, dtype, tokenizer.eos_token_id, layout, display)
            content = io.BytesIO()
            np.savez(content, allow_pickle=False, **shard._asdict())
            replace_file(_shard_path(staging, number), [content.getvalue()], durable=True)
            numbers.append(number)
    if not numbers:
        raise DataError(f"{split.description}: contains no text to train or validate on; choose other data")
    paths = [_shard_path(staging, number) for number in sorted(numbers)]
    return _join(paths, staging / JOINED, dtype, split.description, bad_records.skipped, has_loss_mask=encoder is None)


def _shard_path(staging: Path, number: int) -> Path:
    return staging / f"shard-{number:06d}.npz"


def _complete_shards(staging: Path, layout: str) -> dict[int, int]:
    """The numbers of the shards that are complete, and the bytes of text in each.

    Damaged shards, and those divided differently by another version, are removed.
    """
    complete = {}
    for path in sorted(staging.glob(f"shard-{'[0-9]' * 6}.npz")):
        try:
            shard = _read_shard(path)
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            shard = None
        if shard is None or shard.layout != layout:
            path.unlink()
        else:
            complete[int(path.stem.removeprefix("shard-"))] = shard.text_bytes
    return complete


def _read_shard(path: Path) -> Shard:
    """Raises OSError, EOFError, ValueError, KeyError, TypeError or BadZipFile (by its checksums) if the file is damaged."""
    if path.is_symlink():
        raise OSError(f"{path} is a symbolic link, which is not followed")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return Shard(arrays["tokens"], arrays["ends"], arrays["loss_mask"], int(arrays["text_bytes"]), str(arrays["layout"]))


def _build_shard(batches: Iterable[EncodedPieces], dtype: np.dtype, eos: int, layout: str, display: _Display) -> Shard:
    """The shard of these batches, with `eos` after each document; documents with loss masks have theirs already."""
    tokens, ends, masks = [], [], []
    num_tokens = text_bytes = 0
    for batch in batches:
        ends_document = np.array([piece.ends_document for piece in batch.pieces])
        lengths = np.array([len(ids) for ids in batch.ids], dtype=np.int64)
        if batch.loss_masks is None:
            borders = np.cumsum(lengths + ends_document)
            is_text = np.ones(borders[-1], dtype=bool)
            is_text[borders[ends_document] - 1] = False
            part = np.full(len(is_text), eos, dtype)
            part[is_text] = np.concatenate(batch.ids)
        else:
            borders, part = np.cumsum(lengths), np.concatenate(batch.ids).astype(dtype)
            masks.append(np.concatenate(batch.loss_masks))
        tokens.append(part)
        ends.append(num_tokens + borders[ends_document])
        num_tokens += len(part)
        text_bytes += batch.text_bytes
        display.add(batch.text_bytes)
    loss_mask = np.concatenate(masks) if masks else np.zeros(0, dtype=bool)
    return Shard(np.concatenate(tokens), np.concatenate(ends), loss_mask, text_bytes, layout)


def _join(paths: list[Path], folder: Path, dtype: np.dtype, made_of: str, skipped_records: int, *, has_loss_mask: bool) -> int:
    """Write the store of these shards into `folder`, and return the number of tokens in it."""
    remove(folder)
    folder.mkdir()
    num_documents = 0
    for path in paths:
        with np.load(path, allow_pickle=False) as arrays:
            num_documents += len(arrays["ends"])
    # A memory map, since the offsets may not fit in memory.
    offsets = np.lib.format.open_memmap(folder / "offsets.npy", mode="w+", dtype=np.int64, shape=(num_documents + 1,))
    offsets[0] = 0
    num_tokens, document = 0, 1
    names = ["tokens.bin", *([LOSS_MASK] if has_loss_mask else [])]
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context((folder / name).open("xb")) for name in names]
        hashes = [hashlib.sha256() for _ in names]
        for path in paths:
            shard = _read_shard(path)
            for array, file, digest in zip((shard.tokens, shard.loss_mask), files, hashes, strict=False):
                file.write(array.data)
                digest.update(array.data)
            offsets[document : document + len(shard.ends)] = num_tokens + shard.ends
            num_tokens, document = num_tokens + len(shard.tokens), document + len(shard.ends)
    offsets.flush()
    index = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype.name,
        "tokens": num_tokens,
        "documents": num_documents,
        "skipped_records": skipped_records,
        "made_of": made_of,
        "digests": {
            **{name: digest.hexdigest() for name, digest in zip(names, hashes, strict=True)},
            "offsets.npy": digest_of_file(folder / "offsets.npy"),
        },
    }
    (folder / "index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for path in folder.iterdir():
        sync(path)
    sync(folder)
    return num_tokens


class _Display:
    """Shows how much text has been tokenised: a progress bar on a terminal, else periodic log lines."""

    def __init__(self, description: str, resumed_bytes: int) -> None:
        self._description = description
        self._resumed = self._done = resumed_bytes
        self._began = self._last_line = time.monotonic()
        self._bar = tqdm(desc="tokenising", initial=resumed_bytes, unit="B", unit_scale=True, disable=None, leave=False)

    def add(self, text_bytes: int) -> None:
        """Count `text_bytes` more."""
        self._bar.update(text_bytes)
        self._done += text_bytes
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = (self._done - self._resumed) / (now - self._began)
            log.info("tokenising %s: %.1f MB of text, %.1f MB/s", self._description, self._done / 1e6, rate / 1e6)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
