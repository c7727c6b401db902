"""Marked texts to ids and loss masks. A text is tokenised as one, so its ids are those that it has anywhere else; each token's
place in it tells whether it carries loss.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Iterable

import numpy as np

from dist_trainer.data.encoding import EncodedPieces
from dist_trainer.data.loss_mask import has_token_over_border, tokens_in_spans
from dist_trainer.data.text_pieces import TextPiece
from dist_trainer.data.tokenizers import Tokenizer, text_prefix, with_prefix
from dist_trainer.errors import DataError, counted

log = logging.getLogger(__name__)


class MarkedEncoder:
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


def encoded_with_masks(batches: Iterable[list[TextPiece]], tokenizer: Tokenizer) -> Generator[EncodedPieces, None, None]:
    """The batches in order with their ids and loss masks. Raises DataError."""
    encoder = MarkedEncoder(tokenizer)
    for pieces in batches:
        yield encoder(pieces)
    if encoder.texts_with_token_over_border:
        log.warning(
            "in %d of %s one token holds the end of the prompt and the beginning of the answer (it carries loss), as "
            "where a prompt ends with a space: a prompt alone would be cut into other tokens. Let the answer begin with the "
            "space instead (data.completion_template, data.chat_template)",
            *(encoder.texts_with_token_over_border, counted(encoder.texts, "document")),
        )
