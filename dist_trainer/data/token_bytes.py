"""How many bytes of text each token stands for: what bits per byte are counted by.

The bytes are those of the UTF-8 text that a token decodes to. Tokens that carry no text (EOS, BOS, a chat template's markers)
have none. A character of several tokens gives each of them the bytes it has of it, where they are bytes (byte-level BPE,
SentencePiece's byte fallback). V is the vocabulary.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.tokenizer_check import PROBE
from dist_trainer.data.tokenizers import Tokenizer, text_prefix, vocabulary_size

SPACE = "▁"
"""A space, as SentencePiece writes it."""
SPACES = (SPACE, "Ġ")
"""And GPT-2."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SizeOf = Callable[[str, bool], int]
"""Bytes of a vocabulary's entry, and of one that was added to it, which is spelled as in text."""


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of each token of a tokenizer."""

    sizes: np.ndarray
    """int64 [V]: bytes of the text of each token."""
    leads: np.ndarray
    """bool [V]: begins with the space that the tokenizer puts before a text; never, where it puts none."""
    borders: np.ndarray
    """bool [V]: such a space follows; it is in no text."""

    def count(self, batch: Batch) -> int:
        """Bytes of the targets of `batch` that carry loss; call it while the batch is in host memory."""
        targets, before = batch.targets.numpy(), batch.input_ids.numpy()
        counted = targets != IGNORED_TARGET
        targets, before = targets[counted], before[counted]
        return int(self.sizes[targets].sum() - (self.leads[targets] & self.borders[before]).sum())


def build_token_bytes(tokenizer: Tokenizer) -> TokenBytes | None:
    """The table of `tokenizer`; None where it has no exact one: where tokens do not spell the text they were made of (unknown
    characters, lower-casing, WordPiece's lost spaces).

    What the decoder's kind suggests is believed only if it gives the size of each of the texts of PROBE, in NFC, which many
    tokenizers bring text to.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return None
    size_of = _size_by_decoder(json.loads(backend.decoder.__getstate__()))
    if size_of is None:
        return None
    table = _table(tokenizer, size_of)
    if table is None:
        return None
    special = list(tokenizer.get_added_vocab())
    texts = [text for text in map(_as_kept, PROBE) if text and not any(spelling in text for spelling in special)]
    for text, ids in zip(texts, _ids(tokenizer, texts), strict=True):
        if table.sizes[ids].sum() - table.leads[ids[0]] != len(text.encode()):
            return None
    return table


def _as_kept(text: str) -> str:
    """A text that no exact tokenizer should change: one space before it might be taken for its own, and ▁ for a space."""
    return unicodedata.normalize("NFC", text).replace(SPACE, "_").lstrip(" ")


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _table(tokenizer: Tokenizer, size_of: SizeOf) -> TokenBytes | None:
    """What `size_of` makes of all entries; None where one that was added to them swallows the spaces beside it."""
    num_tokens = vocabulary_size(tokenizer)
    sizes, leads, borders = (np.zeros(num_tokens, dtype=kind) for kind in (np.int64, bool, bool))
    puts_space = _begins_with_space(tokenizer, "a")
    for piece, token in tokenizer.get_vocab().items():
        sizes[token] = size_of(piece, False)
        leads[token] = puts_space and piece.startswith(SPACES)
    special = set(tokenizer.all_special_ids)
    for token, added in tokenizer.added_tokens_decoder.items():
        if added.special:
            special.add(token)
        elif added.lstrip or added.rstrip:
            return None
        sizes[token], leads[token] = size_of(added.content, True), False
    without_text = sorted(special)
    sizes[without_text], leads[without_text] = 0, False
    if puts_space:  # before each part of a text that special tokens cut, or before the whole alone
        after_each = _begins_with_space(tokenizer, f"{tokenizer.eos_token}a", part=1)
        borders[without_text if after_each else [tokenizer.eos_token_id, *text_prefix(tokenizer)[-1:]]] = True
    return TokenBytes(sizes, leads, borders)


def _begins_with_space(tokenizer: Tokenizer, text: str, *, part: int = 0) -> bool:
    """Whether token number `part` of `text` begins with a space."""
    ids = _ids(tokenizer, [text])[0]
    return len(ids) > part and tokenizer.convert_ids_to_tokens(ids[part]).startswith(SPACES)


def _size_by_decoder(decoder: dict[str, Any]) -> SizeOf | None:
    """How entries spell bytes, by the `decoder` of a tokenizer.json; None for those that don't say it of each by itself."""
    steps = decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:  # GPT-2's: a character a byte
        return lambda piece, is_added: len(piece.encode()) if is_added else len(piece)
    if "Metaspace" in kinds or any(step.get("pattern") == {"String": SPACE} for step in steps):
        has_bytes = "ByteFallback" in kinds
        return lambda piece, _: 1 if has_bytes and _BYTE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())
    return None
