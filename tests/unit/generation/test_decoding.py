"""Which tokens can be drawn, and how often."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dist_trainer.generation.decoding import DecodingOptions, draw

PROBABILITIES = {3: 0.5, 0: 0.3, 2: 0.15, 1: 0.05}
"""Of token ids."""
DRAWS = 400


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {3: 0.5, 0: 0.3, 2: 0.15, 1: 0.05}),
        ({"temperature": 0.5}, {3: 0.685, 0: 0.247, 2: 0.062, 1: 0.007}),
        ({"top_k": 3}, {3: 0.526, 0: 0.316, 2: 0.158}),
        ({"top_p": 0.4}, {3: 1.0}),
        ({"top_p": 0.7}, {3: 0.625, 0: 0.375}),
        ({"top_k": 2, "top_p": 0.6}, {3: 1.0}),
        ({"top_k": 4, "top_p": 1.0}, {3: 0.5, 0: 0.3, 2: 0.15, 1: 0.05}),
    ],
    ids=str,
)
def test_top_k_and_top_p_leave_the_most_likely_tokens_in_proportion(options, expected):
    logits_V = torch.tensor([PROBABILITIES[token] for token in range(4)]).log() + 2.0
    generator = torch.Generator().manual_seed(0)
    settings = DecodingOptions(max_new_tokens=1, **options)
    counts = Counter(draw(logits_V, settings, generator) for _ in range(DRAWS))
    assert counts.keys() <= expected.keys()
    for token, probability in expected.items():
        assert counts[token] / DRAWS == pytest.approx(probability, abs=0.08), token
    assert {token for token, probability in expected.items() if probability > 0.02} <= counts.keys()
