"""A sample of text from the model as it is now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.batch import IGNORED_TARGET
from dist_trainer.errors import ConfigError
from dist_trainer.models.generation import can_generate, context_of, generate

log = logging.getLogger(__name__)

SAMPLE_TEMPERATURE = 0.7
SAMPLE_TOP_P = 0.8
PROMPT_TOKENS = 16
BROKEN = "\ufffd"
"""What a tokenizer gives for bytes that are no whole character."""

Sample = Callable[[Any], dict[str, Any]]
"""Gives `prompt` and `text`."""


def sample_of(config: TrainingConfig, tokenizer: Any, model: nn.Module, dataset: Any) -> Sample | None:
    """Samples of text, where they are wanted and the model can give them; None otherwise.

    Where no prompt was given, they continue the beginning of `dataset`'s first row, or answer it where only answers carry loss;
    a row that gives none costs the samples and an INFO line, never the run. Raises ConfigError for a prompt of the user's own
    that does not fit.
    """
    tracking = config.tracking
    if tracking.sample_tokens == 0 or tracking.sample_prompt == "" or not can_generate(model):
        return None
    context = context_of(model) or config.data.sequence_length
    if tracking.sample_prompt is not None:
        prompt = tracking.sample_prompt
        prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False)
        if not 0 < len(prompt_tokens) < context:
            raise ConfigError(
                f"tracking.sample_prompt: {prompt!r} has {len(prompt_tokens)} tokens; the model's context has {context}, "
                'and one must be left to generate. Give another prompt, or "" for no samples'
            )
    else:
        first = dataset[0]
        row = (first if isinstance(first, Tensor) else first.tokens[0]).tolist()
        most = min(PROMPT_TOKENS, config.data.sequence_length // 2, context - 1)
        prompt_tokens = prompt_before_answer(first, most=context - 1) or beginning_of(row, tokenizer, most=most)
        prompt = tokenizer.decode(prompt_tokens, skip_special_tokens=True)
        if not prompt_tokens:
            log.info(
                "no samples of text: the first row of data begins with no text to go on from; tracking.sample_prompt gives one"
            )
            return None
    return build_sample(
        tokenizer, prompt=prompt, prompt_tokens=prompt_tokens, max_new_tokens=tracking.sample_tokens, seed=config.seed
    )


def prompt_before_answer(row: Any, *, most: int) -> list[int]:
    """The tokens of a Batch of one row before the first that carries loss; none where the second one does, as in plain text,
    or where they are more than `most`.
    """
    if isinstance(row, Tensor):
        return []
    carries_loss = (row.targets[0] != IGNORED_TARGET).nonzero()
    length = int(carries_loss[0]) + 1 if len(carries_loss) else 0
    return row.tokens[0, :length].tolist() if 1 < length <= most else []


def beginning_of(row: Sequence[int], tokenizer: Any, *, most: int) -> list[int]:
    """The first tokens of `row` that are text: at most `most`, whole characters and, if possible, whole words."""
    special = set(tokenizer.all_special_ids)
    text_tokens = [token for token in row if token not in special][: most + 1]
    decoded = [tokenizer.decode(text_tokens[:length], skip_special_tokens=True) for length in range(len(text_tokens) + 1)]
    whole = [n for n in range(1, min(most, len(text_tokens)) + 1) if decoded[n].strip() and BROKEN not in decoded[n]]
    # A word is whole where white space follows it; scripts that do without are cut between any two characters.
    at_words = [n for n in whole if n + 1 < len(decoded) and decoded[n + 1][len(decoded[n]) :][:1].isspace()]
    return text_tokens[: max(at_words or whole, default=0)]


def build_sample(tokenizer: Any, *, prompt: str, prompt_tokens: Sequence[int], max_new_tokens: int, seed: int) -> Sample:
    """What continues `prompt`, drawn from a generator of its own: training does not change by it."""

    def sample(model: nn.Module) -> dict[str, Any]:
        tokens = generate(
            model,
            prompt_tokens,
            max_new_tokens=max_new_tokens,
            temperature=SAMPLE_TEMPERATURE,
            top_p=SAMPLE_TOP_P,
            seed=seed,
            eos_token_id=tokenizer.eos_token_id,
        )
        # The last character may lack bytes that were never drawn.
        return {"prompt": prompt, "text": tokenizer.decode(list(tokens), skip_special_tokens=True).rstrip(BROKEN)}

    return sample
