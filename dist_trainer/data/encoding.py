"""Encodes texts as token ids: with gigatoken if it gives the same ids as the tokenizer, else with the tokenizer itself.

gigatoken encodes byte-level BPE some forty times as fast as Hugging Face's tokenizers, but is young. So it is used only if it
gives the same ids for the texts of `probe_texts`, and a sample of each batch is checked as well.

Documents with loss masks are encoded by the tokenizer itself: the masks follow from each token's offsets in the text.
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

from dist_trainer.data.text_pieces import PieceBatch, TextPiece
from dist_trainer.data.tokenizers import Tokenizer, probe_texts, text_prefix, tokenizer_description, with_prefix
from dist_trainer.distributed.machine import usable_cpus
from dist_trainer.errors import DataError, StoppedError, counted

log = logging.getLogger(__name__)

MAX_THREADS = 4
"""More threads would wait for the single one that reads the text."""
CHARACTERS_PER_CACHE = 1 << 29
"""gigatoken caches every word it has seen. It is replaced after this much text, or its memory would grow without bound."""
CHARACTERS_COMPARED = 1 << 11
"""Each batch's sample is a thousandth of it, and takes a fiftieth of its time."""


class TokenizerMismatchError(Exception):
    """The fast encoder failed or gave different ids from the tokenizer's: nothing it has encoded can be trusted."""


class Encoder(Protocol):
    """Encodes texts."""

    name: str
    threads: int
    """How many threads should call it at a time."""

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, [tokens], without special tokens around it."""
        ...


class HuggingFaceEncoder:
    """The tokenizer itself."""

    threads = 1  # it starts its own

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = type(tokenizer).__name__
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int64 [tokens]."""
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]


class FastEncoder:
    """gigatoken with the tokenizer's vocabulary and rules.

    Raises whatever gigatoken raises for rules that it does not support.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        import gigatoken

        self._tokenizer_class: Any = gigatoken.Tokenizer
        self._description = tokenizer_description(tokenizer)
        self._lock = threading.Lock()
        self._renew()
        self.threads = min(MAX_THREADS, usable_cpus())

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32 [tokens]."""
        with self._lock:
            if self._characters > CHARACTERS_PER_CACHE:
                self._renew()
            self._characters += sum(map(len, texts))
            encode = self._encode
        # Not its encode_batch, which imports awkward: that takes longer than tokenising a novel.
        return [encode(text) for text in texts]

    def _renew(self) -> None:
        self._encode = self._tokenizer_class.from_json(self._description).encode
        self._characters = 0


def fast_encoder(tokenizer: Tokenizer) -> FastEncoder | None:
    """gigatoken for `tokenizer`; None if it is not installed, does not support the tokenizer, or gives different ids."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    try:
        fast = FastEncoder(tokenizer)
        difference = first_difference(fast, HuggingFaceEncoder(tokenizer), probe_texts(tokenizer))
    except ImportError:
        log.info("gigatoken is not installed: tokenising with Hugging Face's tokenizers, about ten times slower")
        return None
    except (KeyboardInterrupt, SystemExit, StoppedError):
        raise
    except BaseException as error:  # its panics are not Exceptions
        log.info("gigatoken is not used: it does not support this tokenizer (%s)", error)
        return None
    if difference is not None:
        log.info("gigatoken is not used: its ids differ from this tokenizer's, such as for %.60r", difference)
        return None
    return fast


def first_difference(one: Encoder, other: Encoder, texts: Sequence[str]) -> str | None:
    """The first of `texts` for which the two give different ids."""
    pairs = zip(texts, one(texts), other(texts), strict=True)
    return next((text for text, a, b in pairs if not np.array_equal(a, b)), None)


class EncodedPieces(NamedTuple):
    """A batch of pieces of one shard and the ids of each, [tokens]."""

    shard: int
    pieces: list[TextPiece]
    ids: list[np.ndarray]
    loss_masks: list[np.ndarray] | None = None
    """For documents with loss masks: which of their tokens are trained on, bool [tokens]. Their ids already include the EOS,
    if they have one."""

    @property
    def text_bytes(self) -> int:
        """Size of the text in UTF-8."""
        return sum(len(p.text) if p.text.isascii() else len(p.text.encode()) for p in self.pieces)


def encode(
    batches: Iterable[PieceBatch], encoder: Encoder, own: Encoder, prefix: Sequence[int] = ()
) -> Generator[EncodedPieces, None, None]:
    """The batches in order with their ids, with `prefix` before each document. Reading the next batch and encoding the
    previous ones overlap.

    Raises TokenizerMismatchError if `encoder` is not `own` and fails, or gives different ids for a sample of the batch.
    """
    waiting: deque[tuple[PieceBatch, Future[list[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(encoder.threads, thread_name_prefix="tokenising")
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(encoder, [piece.text for piece in batch.pieces])))
            if len(waiting) > encoder.threads:
                yield _result(*waiting.popleft(), encoder, own, prefix)
        while waiting:
            yield _result(*waiting.popleft(), encoder, own, prefix)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(
    batch: PieceBatch, future: Future[list[np.ndarray]], encoder: Encoder, own: Encoder, prefix: Sequence[int]
) -> EncodedPieces:
    if encoder is not own:
        failure = future.exception()
        if failure is not None:
            raise TokenizerMismatchError(f"{encoder.name} failed: {failure}") from failure
        text = batch.pieces[len(batch.pieces) // 2].text
        start = max(0, len(text) - CHARACTERS_COMPARED) // 2
        sample = text[start : start + CHARACTERS_COMPARED]
        if first_difference(encoder, own, [sample]) is not None:
            raise TokenizerMismatchError(f"{encoder.name} gives other ids than {own.name}, such as for {sample[:60]!r}")
    all_ids, end = future.result(), len(prefix)
    if prefix:
        all_ids = [
            np.concatenate([with_prefix(ids[:end].tolist(), prefix), ids[end:]]) if piece.begins_document else ids
            for piece, ids in zip(batch.pieces, all_ids, strict=True)
        ]
    return EncodedPieces(batch.shard, batch.pieces, all_ids)


def encode_with_loss_masks(batches: Iterable[PieceBatch], tokenizer: Tokenizer) -> Generator[EncodedPieces, None, None]:
    """The batches in order with their ids, including each document's BOS and EOS if it has them, and loss masks.

    Each document is tokenised as one text, so its ids are the same as everywhere else. Its first token is never trained
    on: nothing comes before it. Raises DataError if the tokenizer does not give the offsets of its tokens.
    """
    backend, prefix = _backend_with_offsets(tokenizer), text_prefix(tokenizer)
    num_texts = num_over_border = 0
    for batch in batches:
        all_ids, masks = [], []
        encodings = backend.encode_batch([piece.text for piece in batch.pieces], add_special_tokens=False)
        for piece, encoding in zip(batch.pieces, encodings, strict=True):
            document = piece.loss_masked
            assert document is not None, "other pieces are encoded by `encode`"
            ids = np.array(encoding.ids, dtype=np.int64)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            mask = tokens_in_spans(offsets, document.loss_spans)
            if not document.is_complete:  # else the chat template has written BOS and EOS
                prefixed = np.array(with_prefix(ids.tolist(), prefix), dtype=np.int64)
                mask = np.append(np.zeros(len(prefixed) - len(ids), dtype=bool), mask)
                ids, mask = np.append(prefixed, tokenizer.eos_token_id), np.append(mask, bool(document.loss_spans))
            mask[:1] = False
            all_ids.append(ids)
            masks.append(mask)
            num_over_border += any(
                bool(((offsets[:, 0] < start) & (offsets[:, 1] > start)).any()) for start, _ in document.loss_spans
            )
        num_texts += len(batch.pieces)
        yield EncodedPieces(batch.shard, batch.pieces, all_ids, masks)
    if num_over_border:
        log.warning(
            "in %d of %s one token spans the end of the prompt and the beginning of the answer (it is trained on), as when a "
            "prompt ends with a space: the prompt alone would be tokenised differently. Move the space to the beginning of the "
            "answer (data.completion_template, data.chat_template)",
            *(num_over_border, counted(num_texts, "document")),
        )


def _backend_with_offsets(tokenizer: Tokenizer) -> Any:
    """A copy of the Rust tokenizer of `tokenizer` that adds nothing to a text. Raises DataError if there is none."""
    backend = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", None))
    if backend is None:
        raise DataError(
            f"data.tokenizer: {type(tokenizer).__name__} does not say which characters a token represents, so the tokens "
            "of the answers are unknown; give a tokenizer with a tokenizer.json"
        )
    # Its post-processor would add no special tokens here, but would exclude white space from the offsets.
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return backend


def tokens_in_spans(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens overlap `spans`: bool [tokens].

    `offsets` [tokens, 2] are each token's [start, end) in characters. An empty token, such as a space that the tokenizer
    added, counts as the character that follows.
    """
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (ends > start) & (starts < end)
    return inside
