"""Building a token store: its files written in order, with records of how far they are good, so that a build that was
killed goes on from there to the same bytes.

While it is built, its folder holds tokens.bin, ends.bin (int64: the position behind each document), loss.bin (a byte a token)
where only parts of the documents carry loss, and, once something of all is safe on disk, progress.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dist_trainer.data.encoding import (
    EncodedPieces,
    Encoder,
    HuggingFaceEncoder,
    TokenizerMismatchError,
    encode_with_loss_masks,
    encoded,
    fast_encoder,
)
from dist_trainer.data.growing_file import Extent, GrowingFile, sync
from dist_trainer.data.split import Split
from dist_trainer.data.templates import TextOf
from dist_trainer.data.text_pieces import BadRecords, border_of_pieces, cutting, in_batches, text_pieces
from dist_trainer.data.tokenizers import Tokenizer, text_prefix, vocabulary_size
from dist_trainer.errors import DataError

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
DTYPES = ("uint16", "uint32")
LOSS_MASK = "loss.bin"
PROGRESS = "progress.json"
SECONDS_BETWEEN_RECORDS = 10.0
"""As often, what is written is made safe and recorded: a kill costs no more work than that."""
SECONDS_BETWEEN_LINES = 30.0
"""As often, the log tells how far it is where no terminal shows a bar."""


@dataclass(frozen=True)
class Progress:
    """How much of the split stands in the files, safe on disk."""

    cut_as: str
    """How documents are cut into pieces: other pieces would not go on where these end."""
    encoder: str
    pieces: int = 0
    text_bytes: int = 0
    tokens: Extent = field(default_factory=Extent)
    ends: Extent = field(default_factory=Extent)
    loss: Extent = field(default_factory=Extent)
    """Of loss.bin, where there is one."""


def build_store(
    staging: Path, split: Split, tokenizer: Tokenizer, text: TextOf, *, has_loss_mask: bool = False, max_bad_records: int = 0
) -> int:
    """Write the files of a store into the folder `staging`, from where an earlier build left off if one did; give the number of
    tokens. `has_loss_mask`: `text` makes MarkedTexts, so there is a loss mask to write too. Raises DataError, OSError.
    """
    own = HuggingFaceEncoder(tokenizer)

    def write(encoder: Encoder | None) -> int:
        return _write_store(staging, split, tokenizer, text, encoder, own, BadRecords(max_bad_records))

    if has_loss_mask:
        return write(None)
    left_off = _recorded(staging)
    # An earlier build may have found out that the fast one's ids are other ones.
    fast = None if left_off is not None and left_off.encoder == own.name else fast_encoder(tokenizer)
    if fast is not None:
        try:
            return write(fast)
        except TokenizerMismatchError as error:
            log.warning("tokenising %s anew, with the tokenizer itself: %s", split.description, error)
        remove(staging)
        staging.mkdir()
    return write(own)


def remove(path: Path) -> None:
    """Remove the folder, or the link where there is one instead, if it is there."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def seconds_since_progress(staging: Path) -> float:
    """How long ago what is written there was last recorded; without end where nothing was, so nobody could go on."""
    try:
        return time.time() - (staging / PROGRESS).lstat().st_mtime
    except OSError:
        return float("inf")


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_store(
    staging: Path,
    split: Split,
    tokenizer: Tokenizer,
    text: TextOf,
    encoder: Encoder | None,
    own: Encoder,
    bad_records: BadRecords,
) -> int:
    """Write the files, and give the number of tokens in them. Without an `encoder` the texts are marked ones."""
    dtype = np.dtype(DTYPES[0] if vocabulary_size(tokenizer) <= 1 << 16 else DTYPES[1])
    border = border_of_pieces(tokenizer)
    with contextlib.ExitStack() as stack:
        name = "with loss masks" if encoder is None else encoder.name
        files = stack.enter_context(contextlib.closing(_as_left_off(staging, cutting(border), name, with_mask=encoder is None)))
        if files.pieces:
            log.info("tokenising %s: going on after %.1f MB of text", split.description, files.text_bytes / 1e6)
        display = stack.enter_context(contextlib.closing(_Display(split.description, files.text_bytes)))
        rest = in_batches(itertools.islice(text_pieces(split, text, border, bad_records), files.pieces, None))
        batches = (
            encode_with_loss_masks(rest, tokenizer) if encoder is None else encoded(rest, encoder, own, text_prefix(tokenizer))
        )
        for batch in stack.enter_context(contextlib.closing(batches)):
            files.append(batch, dtype, tokenizer.eos_token_id)
            display.show(files.text_bytes)
        done = files.record()
    if not done.tokens.num_bytes:
        raise DataError(f"{split.description}: there is no text in it to learn from or to validate on; name other data")
    num_documents = _write_offsets(staging)
    digests = {"tokens.bin": done.tokens.digest, "offsets.npy": digest_of(staging / "offsets.npy")}
    if encoder is None:
        digests[LOSS_MASK] = done.loss.digest
    index = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype.name,
        "tokens": done.tokens.num_bytes // dtype.itemsize,
        "documents": num_documents,
        "skipped_records": bad_records.skipped,
        "made_of": split.description,
        "digests": digests,
    }
    with (staging / "index.json").open("wb") as file:
        file.write(json.dumps(index, indent=2).encode())
        sync(file, staging / "index.json")
    for name in ("ends.bin", PROGRESS):
        (staging / name).unlink()
    return index["tokens"]


def _write_offsets(staging: Path) -> int:
    """Make offsets.npy of ends.bin, through a memory map; give the number of documents."""
    ends = np.memmap(staging / "ends.bin", dtype=np.int64, mode="r")
    offsets = np.lib.format.open_memmap(staging / "offsets.npy", mode="w+", dtype=np.int64, shape=(len(ends) + 1,))
    offsets[0] = 0
    offsets[1:] = ends
    offsets.flush()
    with (staging / "offsets.npy").open("rb") as file:
        sync(file, staging / "offsets.npy")
    return len(ends)


class _Unfinished:
    """The files of a store that is being built, open at their ends."""

    def __init__(self, staging: Path, progress: Progress, *, with_mask: bool) -> None:
        self._progress = staging / PROGRESS
        self._cut_as, self._encoder = progress.cut_as, progress.encoder
        self.pieces, self.text_bytes = progress.pieces, progress.text_bytes
        with contextlib.ExitStack() as opened:
            self._tokens = opened.enter_context(contextlib.closing(GrowingFile(staging / "tokens.bin", progress.tokens)))
            self._ends = opened.enter_context(contextlib.closing(GrowingFile(staging / "ends.bin", progress.ends)))
            self._loss = None
            if with_mask:
                self._loss = opened.enter_context(contextlib.closing(GrowingFile(staging / LOSS_MASK, progress.loss)))
            self._opened = opened.pop_all()
        self._when_recorded = time.monotonic()

    def append(self, batch: EncodedPieces, dtype: np.dtype, end: int) -> None:
        """Write the ids of these pieces, with `end` behind each document; marked ones have theirs already."""
        ends_document = np.array([piece.ends_document for piece in batch.pieces])
        lengths = np.array([len(ids) for ids in batch.ids], dtype=np.int64)
        if self._loss is None:
            borders = np.cumsum(lengths + ends_document)
            is_text = np.ones(borders[-1], dtype=bool)
            is_text[borders[ends_document] - 1] = False
            tokens = np.full(len(is_text), end, dtype)
            tokens[is_text] = np.concatenate(batch.ids)
        else:
            assert batch.loss_masks is not None, "marked pieces were encoded as such"
            borders, tokens = np.cumsum(lengths), np.concatenate(batch.ids).astype(dtype)
            self._loss.append(np.concatenate(batch.loss_masks))
        self._ends.append(self._tokens.num_bytes // dtype.itemsize + borders[ends_document])
        self._tokens.append(tokens)
        self.pieces += len(batch.pieces)
        self.text_bytes += batch.text_bytes
        if time.monotonic() - self._when_recorded >= SECONDS_BETWEEN_RECORDS:
            self.record()

    def record(self) -> Progress:
        """Make safe what is written, and say so on disk."""
        parts = (self.pieces, self.text_bytes, self._tokens.secure(), self._ends.secure())
        loss = Extent() if self._loss is None else self._loss.secure()
        progress = Progress(self._cut_as, self._encoder, *parts, loss)
        new = self._progress.with_suffix(".new")
        with new.open("wb") as file:
            file.write(json.dumps(asdict(progress), indent=2).encode())
            sync(file, new)
        new.replace(self._progress)
        self._when_recorded = time.monotonic()
        return progress

    def close(self) -> None:
        self._opened.close()


def _as_left_off(staging: Path, cut_as: str, encoder: str, *, with_mask: bool) -> _Unfinished:
    """The files in `staging`: as an earlier build left them, or empty ones where none did, or cut otherwise."""
    recorded = _recorded(staging)
    if recorded is not None and recorded.cut_as == cut_as:
        with contextlib.suppress(ValueError):  # the disk has not kept what was recorded
            return _Unfinished(staging, recorded, with_mask=with_mask)
    return _Unfinished(staging, Progress(cut_as, encoder), with_mask=with_mask)


def _recorded(staging: Path) -> Progress | None:
    """What an earlier build recorded; None where there is no such record, or none that makes sense."""
    try:
        record: dict[str, Any] = json.loads((staging / PROGRESS).read_text(encoding="utf-8"))
        # Records made before there were loss masks have no word of them.
        record |= {name: Extent(**record[name]) for name in ("tokens", "ends", "loss") if name != "loss" or name in record}
        progress = Progress(**record)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    numbers = (progress.pieces, progress.text_bytes, progress.tokens.num_bytes, progress.ends.num_bytes)
    return progress if all(isinstance(number, int) and number >= 0 for number in numbers) else None


class _Display:
    """Shows how much text is done: a bar on a terminal, else a line in the log now and then."""

    def __init__(self, description: str, text_bytes: int) -> None:
        self._description = description
        self._before = self._done = text_bytes
        self._began = self._last_line = time.monotonic()
        self._bar = tqdm(desc="tokenising", initial=text_bytes, unit="B", unit_scale=True, disable=None, leave=False)

    def show(self, text_bytes: int) -> None:
        """So many bytes are done by now."""
        self._bar.update(text_bytes - self._done)
        self._done = text_bytes
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = (text_bytes - self._before) / (now - self._began)
            log.info("tokenising %s: %.1f MB of text, %.1f MB/s", self._description, text_bytes / 1e6, rate / 1e6)

    def close(self) -> None:
        self._bar.close()
