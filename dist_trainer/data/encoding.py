"""Texts to token ids: by gigatoken where that gives a tokenizer's own ids, else by the tokenizer itself.

gigatoken encodes byte-level BPE some forty times as fast as Hugging Face's tokenizers, but is young. So it is used only
where it gave the same ids for the texts of `probe_texts`, and some of each batch is compared again as it goes along.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from dist_trainer.data.text_pieces import TextPiece
from dist_trainer.data.tokenizer_check import probe_texts
from dist_trainer.data.tokenizers import Tokenizer, text_prefix, tokenizer_description, with_prefix
from dist_trainer.distributed.machine import usable_cpus
from dist_trainer.errors import DataError, StoppedError, counted

log = logging.getLogger(__name__)

MOST_THREADS = 4
"""More would wait for the one thread that reads the text."""
CHARACTERS_OF_ONE_CACHE = 1 << 29
"""gigatoken remembers each word that it has met: after so much text, by a fresh one, or its memory would grow without end."""
CHARACTERS_COMPARED = 1 << 11
"""Of each batch: a thousandth of it, at a fiftieth of the time."""


class TokenizerMismatchError(Exception):
    """The fast encoder gave other ids than the tokenizer, or failed: what it has made is not to be trusted."""


class Encoder(Protocol):
    """Gives texts their ids."""

    name: str
    threads: int
    """How many may call it at a time to good effect."""

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, [tokens], without special tokens around it."""
        ...


class HuggingFaceEncoder:
    """The tokenizer itself."""

    threads = 1  # it has its own

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = type(tokenizer).__name__
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int64 [tokens]."""
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]


class FastEncoder:
    """gigatoken with the tokenizer's vocabulary and rules.

    Raises what gigatoken raises where it cannot follow them.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        import gigatoken

        self._tokenizer_class: Any = gigatoken.Tokenizer
        self._description = tokenizer_description(tokenizer)
        self._lock = threading.Lock()
        self._renew()
        self.threads = min(MOST_THREADS, usable_cpus())

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32 [tokens]."""
        with self._lock:
            if self._characters > CHARACTERS_OF_ONE_CACHE:
                self._renew()
            self._characters += sum(map(len, texts))
            encode = self._encode
        # Not its encode_batch: that one imports awkward, which takes longer than a novel takes to tokenise.
        return [encode(text) for text in texts]

    def _renew(self) -> None:
        self._encode = self._tokenizer_class.from_json(self._description).encode
        self._characters = 0


def fast_encoder(tokenizer: Tokenizer) -> FastEncoder | None:
    """gigatoken for `tokenizer`; None where it is not installed, does not know such a tokenizer, or gives other ids."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    try:
        fast = FastEncoder(tokenizer)
        differs = first_difference(fast, HuggingFaceEncoder(tokenizer), probe_texts(tokenizer))
    except ImportError:
        log.info("gigatoken is not installed: Hugging Face's tokenizers do the tokenising, some ten times as slowly")
        return None
    except (KeyboardInterrupt, SystemExit, StoppedError):
        raise
    except BaseException as error:  # its panics are no Exceptions
        log.info("gigatoken cannot stand in for this tokenizer (%s)", error)
        return None
    if differs is not None:
        log.info("gigatoken gives other ids than this tokenizer, as for %.60r: it is not used", differs)
        return None
    return fast


def first_difference(one: Encoder, other: Encoder, texts: Sequence[str]) -> str | None:
    """The first of `texts` that gets other ids from `one` than from `other`."""
    pairs = zip(texts, one(texts), other(texts), strict=True)
    return next((text for text, a, b in pairs if not np.array_equal(a, b)), None)


class EncodedPieces(NamedTuple):
    """A batch of pieces and the ids of each, [tokens]."""

    pieces: list[TextPiece]
    ids: list[np.ndarray]
    loss_masks: list[np.ndarray] | None = None
    """Where the pieces are whole MarkedTexts: which of their tokens carry loss, bool [tokens]. Their ids have the EOS then, if
    one belongs there."""

    @property
    def text_bytes(self) -> int:
        """Of the text in UTF-8."""
        return sum(len(p.text) if p.text.isascii() else len(p.text.encode()) for p in self.pieces)


def encoded(
    batches: Iterable[list[TextPiece]], encoder: Encoder, own: Encoder, prefix: Sequence[int] = ()
) -> Generator[EncodedPieces, None, None]:
    """The batches in order with their ids, those of each document's first piece after `prefix`: while one is read, those
    before it are encoded.

    Raises TokenizerMismatchError where `encoder` is not `own` and fails, or gives other ids for a sample of the batch.
    """
    waiting: deque[tuple[list[TextPiece], Future[list[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(encoder.threads, thread_name_prefix="tokenising")
    try:
        for pieces in batches:
            waiting.append((pieces, pool.submit(encoder, [piece.text for piece in pieces])))
            if len(waiting) > encoder.threads:
                yield _begun(_result(*waiting.popleft(), encoder, own), prefix)
        while waiting:
            yield _begun(_result(*waiting.popleft(), encoder, own), prefix)
    finally:
        pool.shutdown(cancel_futures=True)


def _begun(batch: EncodedPieces, prefix: Sequence[int]) -> EncodedPieces:
    """The batch with `prefix` before each document."""
    if not prefix:
        return batch
    end = len(prefix)
    begun = [
        np.concatenate([with_prefix(ids[:end].tolist(), prefix), ids[end:]]) if piece.begins_document else ids
        for piece, ids in zip(batch.pieces, batch.ids, strict=True)
    ]
    return batch._replace(ids=begun)


def _result(pieces: list[TextPiece], ids: Future[list[np.ndarray]], encoder: Encoder, own: Encoder) -> EncodedPieces:
    if encoder is own:
        return EncodedPieces(pieces, ids.result())
    failure = ids.exception()
    if failure is not None:
        raise TokenizerMismatchError(f"{encoder.name} failed: {failure}") from failure
    text = pieces[len(pieces) // 2].text
    start = max(0, len(text) - CHARACTERS_COMPARED) // 2
    sample = text[start : start + CHARACTERS_COMPARED]
    if first_difference(encoder, own, [sample]) is not None:
        raise TokenizerMismatchError(f"{encoder.name} gives other ids than {own.name}, as for {sample[:60]!r}")
    return EncodedPieces(pieces, ids.result())


class LossMaskEncoder:
    """Gives texts their ids and the characters that each token is made of."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises DataError where the tokenizer cannot tell places."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"data.tokenizer: {type(tokenizer).__name__} cannot tell which characters its tokens are made of, so which of "
                "them carry loss is unknown; give a tokenizer with a tokenizer.json"
            )
        self._prefix, self._end = text_prefix(tokenizer), tokenizer.eos_token_id
        self._backend = copy.deepcopy(backend)
        # Without special tokens around a text it has nothing to do but to leave white space out of the places.
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        self.texts = self.texts_with_token_over_border = 0

    def __call__(self, pieces: list[TextPiece]) -> EncodedPieces:
        """Ids with each document's BOS and EOS, if it has them, and loss masks. No document's first token carries loss: nothing
        comes before it to tell it from.
        """
        all_ids, masks = [], []
        encodings = self._backend.encode_batch([piece.text for piece in pieces], add_special_tokens=False)
        for piece, encoding in zip(pieces, encodings, strict=True):
            marked = piece.marked
            assert marked is not None, "other pieces are encoded elsewhere"
            ids = np.array(encoding.ids, dtype=np.int64)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            mask = tokens_in_spans(offsets, marked.loss_spans)
            if not marked.is_complete:  # else a chat template has written both
                begun = np.array(with_prefix(ids.tolist(), self._prefix), dtype=np.int64)
                mask = np.append(np.zeros(len(begun) - len(ids), dtype=bool), mask)
                ids, mask = np.append(begun, self._end), np.append(mask, bool(marked.loss_spans))
            mask[:1] = False
            all_ids.append(ids)
            masks.append(mask)
            self.texts_with_token_over_border += has_token_over_border(offsets, marked.loss_spans)
        self.texts += len(pieces)
        return EncodedPieces(pieces, all_ids, masks)


def encode_with_loss_masks(batches: Iterable[list[TextPiece]], tokenizer: Tokenizer) -> Generator[EncodedPieces, None, None]:
    """The batches in order with their ids and loss masks. Raises DataError."""
    encoder = LossMaskEncoder(tokenizer)
    for pieces in batches:
        yield encoder(pieces)
    if encoder.texts_with_token_over_border:
        log.warning(
            "in %d of %s one token holds the end of the prompt and the beginning of the answer (it carries loss), as "
            "where a prompt ends with a space: a prompt alone would be cut into other tokens. Let the answer begin with the "
            "space instead (data.completion_template, data.chat_template)",
            *(encoder.texts_with_token_over_border, counted(encoder.texts, "document")),
        )


def tokens_in_spans(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens lie in `spans`, if only in part: bool [tokens].

    `offsets` [tokens, 2] are each token's [start, end) in characters. One of no characters, such as a space that the
    tokenizer put there itself, counts as the character that follows.
    """
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (ends > start) & (starts < end)
    return inside


def has_token_over_border(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a token holds characters from before one of `spans` and from inside it."""
    return any(bool(((offsets[:, 0] < start) & (offsets[:, 1] > start)).any()) for start, _ in spans)
