"""Which tokens can be drawn, and how often."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dist_trainer.config.schema import ModelConfig
from dist_trainer.errors import ConfigError
from dist_trainer.generation.decoding import DecodingOptions, draw, generate
from dist_trainer.models.decoder_lm import DecoderLM

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


@pytest.mark.parametrize(("prompt", "wanted", "made"), [(3, 9, 5), (7, 9, 1), (3, 2, 2), (8, 0, 0)])
def test_text_ends_where_the_context_does(prompt, wanted, made):
    config = ModelConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    model = DecoderLM(config, 16, 8)
    assert len(list(generate(model, [1] * prompt, DecodingOptions(wanted)))) == made


def test_a_prompt_that_fills_the_context_is_rejected():
    config = ModelConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(ConfigError, match="the prompt has 8 tokens; the model's context is 8: shorten it"):
        list(generate(DecoderLM(config, 16, 8), [1] * 8, DecodingOptions(1)))
