"""How many bytes of text each token represents, to compute bits per byte.

They are the bytes of the UTF-8 text that a token decodes to. Tokens without text (EOS, BOS, a chat template's markers) have
none. If a character is divided among several byte tokens (byte-level BPE, SentencePiece's byte fallback), each counts its own.
V is the size of the vocabulary.
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
from dist_trainer.data.tokenizers import PROBE, Tokenizer, text_prefix, vocabulary_size

SPACE = "▁"
"""How SentencePiece writes a space."""
SPACES = (SPACE, "Ġ")
"""How GPT-2 writes a space."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SizeOf = Callable[[str, bool], int]
"""(vocabulary entry, whether it is an added token and so spelled as in text) to bytes."""


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of each token of a tokenizer."""

    sizes: np.ndarray
    """int64 [V]: bytes of the text of each token."""
    leads: np.ndarray
    """bool [V]: the token begins with the space that the tokenizer puts before a text, if it does."""
    borders: np.ndarray
    """bool [V]: such a space, which is not in the text, follows the token."""

    def count(self, batch: Batch) -> int:
        """Bytes of the targets of `batch` that are trained on. Call it while the batch is in host memory."""
        targets, before = batch.targets.numpy(), batch.input_ids.numpy()
        counted = targets != IGNORED_TARGET
        targets, before = targets[counted], before[counted]
        return int(self.sizes[targets].sum() - (self.leads[targets] & self.borders[before]).sum())


def build_token_bytes(tokenizer: Tokenizer) -> TokenBytes | None:
    """The table of `tokenizer`; None if tokens do not spell the text exactly (unknown characters, lower-casing, lost spaces).

    A table is used only if it gives the correct size of each text of PROBE. They are compared in NFC, to which many
    tokenizers normalise.
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
    texts = [text for text in map(_unchanged, PROBE) if text and not any(spelling in text for spelling in special)]
    for text, ids in zip(texts, _ids(tokenizer, texts), strict=True):
        if table.sizes[ids].sum() - table.leads[ids[0]] != len(text.encode()):
            return None
    return table


def _unchanged(text: str) -> str:
    """The text, except for what exact tokenizers change: they may add a space before it, and read ▁ as a space."""
    return unicodedata.normalize("NFC", text).replace(SPACE, "_").lstrip(" ")


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _table(tokenizer: Tokenizer, size_of: SizeOf) -> TokenBytes | None:
    """The table by `size_of`; None if an added entry strips the spaces next to it."""
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
    if puts_space:  # before each part between special tokens, or only at the start of the text
        after_each = _begins_with_space(tokenizer, f"{tokenizer.eos_token}a", part=1)
        borders[without_text if after_each else [tokenizer.eos_token_id, *text_prefix(tokenizer)[-1:]]] = True
    return TokenBytes(sizes, leads, borders)


def _begins_with_space(tokenizer: Tokenizer, text: str, *, part: int = 0) -> bool:
    """Whether token number `part` of `text` begins with a space."""
    ids = _ids(tokenizer, [text])[0]
    return len(ids) > part and tokenizer.convert_ids_to_tokens(ids[part]).startswith(SPACES)


def _size_by_decoder(decoder: dict[str, Any]) -> SizeOf | None:
    """How entries spell bytes, by the `decoder` of a tokenizer.json; None if that depends on their neighbours."""
    steps = decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:  # GPT-2's: a character per byte
        return lambda piece, is_added: len(piece.encode()) if is_added else len(piece)
    if "Metaspace" in kinds or any(step.get("pattern") == {"String": SPACE} for step in steps):
        has_bytes = "ByteFallback" in kinds
        return lambda piece, _: 1 if has_bytes and _BYTE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())
    return None
