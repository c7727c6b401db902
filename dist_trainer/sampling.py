"""A sample of text from the model as it is now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.models.generation import generate

SAMPLE_TEMPERATURE = 0.7
SAMPLE_TOP_P = 0.8

Sample = Callable[[Any], dict[str, Any]]
"""Gives `prompt` and `text`."""


def build_sample(tokenizer: Any, *, prompt: str, max_new_tokens: int, seed: int) -> Sample:
    """What continues `prompt`, drawn from a generator of its own: training does not change by it."""
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False)

    def sample(model: DecoderLM) -> dict[str, Any]:
        tokens = generate(
            model,
            prompt_tokens,
            max_new_tokens=max_new_tokens,
            temperature=SAMPLE_TEMPERATURE,
            top_p=SAMPLE_TOP_P,
            seed=seed,
            eos_token_id=tokenizer.eos_token_id,
        )
        return {"prompt": prompt, "text": tokenizer.decode(list(tokens), skip_special_tokens=True)}

    return sample
