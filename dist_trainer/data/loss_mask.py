"""`LossMaskedText`: a document of which only parts carry loss, and which tokens these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LossMaskedText:
    """A whole document and what in it is to be learnt."""

    text: str
    loss_spans: Sequence[tuple[int, int]]
    """[start, end) in characters, ascending, apart from one another."""
    is_complete: bool
    """Whether the text says itself where it ends; otherwise the EOS follows, and carries loss if anything does."""


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
