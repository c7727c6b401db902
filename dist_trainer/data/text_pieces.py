"""Divides documents into texts short enough to tokenise: complete ones, or pieces of long ones that give the same ids.

Pieces are grouped into shards, the units in which a token store is built. How text is divided depends only on the text.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from dist_trainer.data.records import Record
from dist_trainer.data.split import Split
from dist_trainer.data.templates import LossMaskedText, RecordToText
from dist_trainer.data.text_file import LongText
from dist_trainer.data.tokenizers import Tokenizer
from dist_trainer.errors import DataError, counted

log = logging.getLogger(__name__)

BATCH_PIECES = 1024
"""Largest batch that is tokenised at once, in pieces."""
BATCH_CHARACTERS = 1 << 21
"""The same in characters; the last piece may exceed it."""
SHARD_CHARACTERS = 1 << 26
"""Size of a shard: a few seconds of work, the most that a kill can lose."""
PIECE_CHARACTERS = 1 << 20
"""A longer document is tokenised in pieces: a tokenizer's memory is a hundred times the size of the text."""
Border = Literal["with the next", "dropped", "none"]
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


class TextPiece(NamedTuple):
    """A document, or part of a long one."""

    text: str
    ends_document: bool
    begins_document: bool = True
    loss_masked: LossMaskedText | None = None
    """The complete document, if only parts of it are trained on; such documents are never cut into pieces."""


class PieceBatch(NamedTuple):
    """Consecutive pieces of one shard."""

    shard: int
    pieces: list[TextPiece]


class BadRecords:
    """Skips records that cannot be read or used, up to a limit; see data.bad_records."""

    def __init__(self, limit: int = 0) -> None:
        self.limit, self.skipped = limit, 0

    def skip(self, error: DataError) -> None:
        """Log `error`, which names a bad record. Raises it if the limit is exceeded."""
        if self.skipped >= self.limit:
            raise DataError(f"{error} (data.bad_records allows {counted(self.limit, 'such record')})") if self.limit else error
        self.skipped += 1
        log.warning("%s; skipped, %d of at most %s (data.bad_records)", error, self.skipped, counted(self.limit, "record"))


def text_pieces(split: Split, text: RecordToText, border: Border, bad_records: BadRecords) -> Iterator[TextPiece]:
    """All documents of `split` in order, except those without text. Raises DataError naming the place."""
    for where, record in split.records():
        try:
            document = _document(where, record, text)
        except DataError as error:
            bad_records.skip(error)
            continue
        if isinstance(document, LossMaskedText):
            if document.text:
                yield TextPiece(document.text, ends_document=True, loss_masked=document)
        elif document:
            yield from pieces_of(document, border)


def _document(where: str, record: Record | DataError, text: RecordToText) -> str | LongText | LossMaskedText:
    """The document that `text` makes of the record. Raises DataError naming the place, also for lone surrogates."""
    if isinstance(record, DataError):
        raise record
    document = text(where, record)
    if not isinstance(document, LongText):
        _check_surrogates(where, document.text if isinstance(document, LossMaskedText) else document)
    return document


def in_batches(pieces: Iterable[TextPiece]) -> Iterator[PieceBatch]:
    """Batches of pieces in order, numbered by their shards."""
    batch: list[TextPiece] = []
    shard = characters = in_earlier_batches = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        ends_shard = in_earlier_batches + characters >= SHARD_CHARACTERS
        if ends_shard or len(batch) >= BATCH_PIECES or characters >= BATCH_CHARACTERS:
            yield PieceBatch(shard, batch)
            shard, in_earlier_batches = (shard + 1, 0) if ends_shard else (shard, in_earlier_batches + characters)
            batch, characters = [], 0
    if batch:
        yield PieceBatch(shard, batch)


def shard_layout(border: Border) -> str:
    """Identifies how text is divided into pieces and shards."""
    return json.dumps([PIECE_CHARACTERS, border, SHARD_CHARACTERS])


def detect_border(tokenizer: Tokenizer) -> Border:
    """What to do with the space at which a document is cut: keep it with the next piece, drop it (the tokenizer puts one
    before every text), or never cut, because neither gives the ids of the complete text.
    """
    first, second = "the first words", "and then others"

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    whole = ids(f"{first} {second}")
    if whole == ids(first) + ids(f" {second}"):
        return "with the next"
    return "dropped" if whole == ids(first) + ids(second) else "none"


def pieces_of(document: str | LongText, border: Border = "with the next") -> Iterator[TextPiece]:
    """The document, or pieces of a long one. They end between two words if possible, where tokens end as well.

    Where they end does not depend on the parts in which a LongText is read.
    """
    held, start, begins = "", 0, True
    for part in [document] if isinstance(document, str) else document.parts():
        held, start = held[start:] + part, 0
        while len(held) - start > PIECE_CHARACTERS and (cut := _cut(held, start, border)) is not None:
            yield TextPiece(held[start:cut], ends_document=False, begins_document=begins)
            start, begins = cut + 1 if border == "dropped" else cut, False
    yield TextPiece(held[start:], ends_document=True, begins_document=begins)


def _cut(document: str, start: int, border: Border) -> int | None:
    """The end of the piece that begins at `start`: the last place between words within PIECE_CHARACTERS. None: no cut."""
    if border == "none":
        return None
    limit = start + PIECE_CHARACTERS
    places = [match.start() for match in _BETWEEN_WORDS.finditer(document, limit - PIECE_CHARACTERS // 8, limit)]
    if places or border == "with the next":
        return places[-1] if places else limit
    later = _BETWEEN_WORDS.search(document, limit)  # never cut within a word: the tokenizer would add a space there
    return later.start() if later else None


def _check_surrogates(where: str, document: str) -> None:
    """Raises DataError for lone surrogates, which JSON can contain but no tokenizer accepts."""
    if document.isascii():  # a flag of the string: no scan
        return
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a character (a lone surrogate, {document[error.start]!a}) at position {error.start} of the "
            "text; remove it"
        ) from error
