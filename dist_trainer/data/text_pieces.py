"""Documents as texts short enough to tokenise: whole ones, or pieces of long ones whose ids are those of the whole."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from dist_trainer.data.records import Record
from dist_trainer.data.split import Split
from dist_trainer.data.templates import LossMaskedText, TextOf
from dist_trainer.data.text_file import LongText
from dist_trainer.data.tokenizers import Tokenizer
from dist_trainer.errors import DataError, counted

log = logging.getLogger(__name__)

BATCH_PIECES = 1024
BATCH_CHARACTERS = 1 << 21
PIECE_CHARACTERS = 1 << 20
"""A longer document is tokenised in pieces, or a tokenizer would need a hundred times its size in memory."""
Border = Literal["with the next", "dropped", "none"]
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


class TextPiece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool
    begins_document: bool = True
    marked: LossMaskedText | None = None
    """The whole document, of which only parts carry loss; such a one is never cut into pieces."""


class BadRecords:
    """Skips records that cannot be read or used, up to a limit; see data.bad_records."""

    def __init__(self, limit: int = 0) -> None:
        self.limit, self.skipped = limit, 0

    def skip(self, error: DataError) -> None:
        """Log what is wrong with the record that `error` names. Raises it if that is one too many."""
        if self.skipped >= self.limit:
            raise DataError(f"{error} (data.bad_records allows {counted(self.limit, 'such record')})") if self.limit else error
        self.skipped += 1
        log.warning("%s; skipped, as %d of at most %s (data.bad_records)", error, self.skipped, counted(self.limit, "record"))


def text_pieces(split: Split, text: TextOf, border: Border, bad_records: BadRecords) -> Iterator[TextPiece]:
    """All documents of `split` in order; one without text is left out. Raises DataError naming the place."""
    for where, record in split.records():
        try:
            document = _document(where, record, text)
        except DataError as error:
            bad_records.skip(error)
            continue
        if isinstance(document, LossMaskedText):
            if document.text:
                yield TextPiece(document.text, ends_document=True, marked=document)
        elif document:
            yield from pieces_of(document, border)


def _document(where: str, record: Record | DataError, text: TextOf) -> str | LongText | LossMaskedText:
    """What `text` makes of the record, without halves of characters. Raises DataError naming the place."""
    if isinstance(record, DataError):
        raise record
    document = text(where, record)
    if not isinstance(document, LongText):
        _refuse_surrogates(where, document.text if isinstance(document, LossMaskedText) else document)
    return document


def in_batches(pieces: Iterable[TextPiece]) -> Iterator[list[TextPiece]]:
    """At most BATCH_PIECES of them at a time, or as many as make BATCH_CHARACTERS."""
    batch: list[TextPiece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if len(batch) >= BATCH_PIECES or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def cutting(border: Border) -> str:
    """What `text_pieces` depends on, beside the text."""
    return json.dumps([PIECE_CHARACTERS, border])


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


def pieces_of(document: str | LongText, border: Border = "with the next") -> Iterator[TextPiece]:
    """The document; or, of a long one, pieces that end between two words, where tokens end anyway, if there is such a place.

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
    if document.isascii():  # known to the string itself: nothing is read for it
        return
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a character (a lone surrogate, {document[error.start]!a}) at place {error.start} of the text; "
            "remove it"
        ) from error
