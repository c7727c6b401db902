"""Text samples during training."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dist_trainer.config.schema import DataConfig, TrackingConfig
from dist_trainer.data.batch import IGNORED_TARGET
from dist_trainer.data.chat import ChatTemplate
from dist_trainer.data.loader import are_conversations
from dist_trainer.data.messages import read_messages
from dist_trainer.data.tokenizers import prompt_ids, text_prefix, with_prefix
from dist_trainer.distributed.collectives import PendingSum
from dist_trainer.errors import ConfigError, counted
from dist_trainer.generation.decoding import DecodingOptions, can_generate, context_length, end_tokens, generate
from dist_trainer.generation.text import REPLACEMENT

log = logging.getLogger(__name__)

SAMPLE_TEMPERATURE = 0.6
SAMPLE_TOP_P = 0.8
PROMPT_TOKENS = 16
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")

Sample = Callable[[Any, Callable[[], bool]], dict[str, Any] | None]
"""From a model and a function that tells whether to stop (called before each token) to `prompt` and `text`; None if stopped."""


class TextSamples:
    """A callback that logs text samples: after each validation, or every `every_steps` steps and after the last one.

    A sample that a signal interrupts is generated when the run is resumed.
    """

    def __init__(self, sample: Sample | None, every_steps: int | None) -> None:
        """`sample` is None on all ranks but one. `every_steps`: None: after each validation; 0: never."""
        self._sample, self._every_steps = sample, every_steps

    def on_fit_start(self, trainer: Any) -> None:
        """Generate the sample that a signal interrupted."""
        if trainer.progress.has_pending_sample:
            self._log_sample(trainer)

    def on_step_end(self, trainer: Any, result: Any) -> None:
        """Log a sample if the step is due."""
        if self._every_steps and (result.step % self._every_steps == 0 or result.step == trainer.max_steps):
            self._log_sample(trainer)

    def on_validation_end(self, trainer: Any, result: Any) -> None:
        """Log a sample if each validation has one."""
        if self._every_steps is None:
            self._log_sample(trainer)

    def _log_sample(self, trainer: Any) -> None:
        """Called on all ranks. An error is only a warning: a user's model may not support generation."""
        world, step = trainer.world, trainer.progress.step

        def interrupted() -> bool:
            world.heartbeat.mark("sampling", step=step)
            return bool(world.stop_request)

        start, was_interrupted = time.perf_counter(), False
        with trainer.evaluating() as model:
            if self._sample is not None:
                try:
                    text = self._sample(model, interrupted)
                except Exception as error:
                    log.warning("step %d: no text sample (%s: %s); training continues", step, type(error).__name__, error)
                else:
                    was_interrupted = text is None
                    if text is not None:
                        trainer.log({"kind": "sample", "step": step, **text, "seconds": time.perf_counter() - start})
            [ranks_interrupted] = PendingSum([int(was_interrupted)], world).wait()
        trainer.progress.record_sample(was_interrupted=bool(ranks_interrupted))


def build_sample(
    tracking: TrackingConfig, data: DataConfig, tokenizer: Any, model: nn.Module, dataset: Any, *, seed: int
) -> Sample | None:
    """The samples that `tracking` asks for; None if it asks for none or `model` does not support generation.

    Without tracking.sample_prompt they continue the start of the first sequence of `dataset`, or answer its prompt if only
    answers are trained on. A sequence without text means no samples and an INFO line, not an error. Raises ConfigError if
    tracking.sample_prompt does not fit into the context.
    """
    if 0 in (tracking.sample_tokens, tracking.sample_every_steps) or tracking.sample_prompt == "" or not can_generate(model):
        return None
    context = context_length(model) or data.sequence_length
    if tracking.sample_prompt is not None:
        prompt, tokens = configured_prompt(tracking.sample_prompt, data, tokenizer, is_chat=are_conversations(dataset))
        if not 0 < len(tokens) < context:
            raise ConfigError(
                f"tracking.sample_prompt: {tracking.sample_prompt!r} has {counted(len(tokens), 'token')}; the model's context "
                f'is {context}, and one token must be left to generate. Give another prompt, or "" for no samples'
            )
    else:
        most = min(PROMPT_TOKENS, data.sequence_length // 2, context - 1)
        tokens = prompt_from_data(dataset[0], tokenizer, most=most, context=context)
        prompt = tokenizer.decode(tokens, skip_special_tokens=True)
        if not tokens:
            log.info("no text samples: the first sequence of the data has no text to continue; set tracking.sample_prompt")
            return None

    options = DecodingOptions(tracking.sample_tokens, temperature=SAMPLE_TEMPERATURE, top_p=SAMPLE_TOP_P, seed=seed)

    def sample(model: nn.Module, interrupted: Callable[[], bool]) -> dict[str, Any] | None:
        new_tokens: list[int] = []
        if interrupted():
            return None
        for token in generate(model, tokens, options, end_token_ids={tokenizer.eos_token_id, *end_tokens(model)}):
            new_tokens.append(token)
            if interrupted():
                return None
        # The last character may be incomplete.
        return {"prompt": prompt, "text": tokenizer.decode(new_tokens, skip_special_tokens=True).rstrip(REPLACEMENT)}

    return sample


def configured_prompt(prompt: str, data: DataConfig, tokenizer: Any, *, is_chat: bool) -> tuple[str, list[int]]:
    """tracking.sample_prompt as samples show it, and its tokens: text, or, if the data are conversations (`is_chat`), a JSON
    list of messages to be answered. Raises ConfigError, DataError.
    """
    if not is_chat or not _LIST_OF_OBJECTS.match(prompt):
        return prompt, prompt_ids(tokenizer, prompt)
    key = "tracking.sample_prompt"
    try:
        messages = read_messages(key, {"messages": json.loads(prompt)}, "messages")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{key}: {prompt!r} starts like a list of messages but is not valid JSON ({error}); write it as "
            '[{"role": "user", "content": "Hi"}]'
        ) from error
    rendered = ChatTemplate(data, tokenizer).prompt(key, messages)
    tokens = tokenizer.encode(rendered, add_special_tokens=False)
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens


def prompt_from_data(sequence: Any, tokenizer: Any, *, most: int, context: int) -> list[int]:
    """The prompt before the first answer in `sequence` if it is shorter than `context`, or else the start of its text with the
    tokenizer's prefix, at most `most` tokens. Empty if there is neither.
    """
    if tokens := prompt_before_answer(sequence, most=context - 1):
        return tokens
    ids = (sequence if isinstance(sequence, Tensor) else sequence.input_ids[0]).tolist()
    prefix = text_prefix(tokenizer)
    start = start_of_text(ids, tokenizer, most=most - len(prefix))
    return with_prefix(start, prefix) if start else []


def prompt_before_answer(sequence: Any, *, most: int) -> list[int]:
    """The tokens of a Batch of one sequence before its first target; none if already the second token is one, as in plain text,
    or if they are more than `most`.
    """
    if isinstance(sequence, Tensor):
        return []
    targets = (sequence.targets[0] != IGNORED_TARGET).nonzero()
    length = int(targets[0]) + 1 if len(targets) else 0
    return sequence.input_ids[0, :length].tolist() if 1 < length <= most else []


def start_of_text(ids: Sequence[int], tokenizer: Any, *, most: int) -> list[int]:
    """The first text tokens of `ids`: at most `most`, ending after a complete character and, if possible, a complete word."""
    special = set(tokenizer.all_special_ids)
    text_tokens = [token for token in ids if token not in special][: most + 1]
    decoded = [tokenizer.decode(text_tokens[:length], skip_special_tokens=True) for length in range(len(text_tokens) + 1)]
    lengths = [n for n in range(1, min(most, len(text_tokens)) + 1) if decoded[n].strip() and REPLACEMENT not in decoded[n]]
    # A word is complete if white space follows it. Scripts without white space are cut after any character.
    at_words = [n for n in lengths if n + 1 < len(decoded) and decoded[n + 1][len(decoded[n]) :][:1].isspace()]
    return text_tokens[: max(at_words or lengths, default=0)]
