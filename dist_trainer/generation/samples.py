"""A sample of text from the model as it is now: when, of what, and where it goes."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dist_trainer.config.schema import DataConfig, TrainingConfig
from dist_trainer.data.batch import IGNORED_TARGET
from dist_trainer.data.chat import ChatTemplate, read_messages
from dist_trainer.data.loader import are_conversations
from dist_trainer.data.tokenizers import prompt_ids, text_prefix, with_prefix
from dist_trainer.distributed.collectives import PendingSum
from dist_trainer.errors import ConfigError, counted
from dist_trainer.generation.decoding import can_generate, context_length, end_tokens, generate
from dist_trainer.generation.text import REPLACEMENT

log = logging.getLogger(__name__)

SAMPLE_TEMPERATURE = 0.6
SAMPLE_TOP_P = 0.8
PROMPT_TOKENS = 16
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")

Sample = Callable[[Any, Callable[[], bool]], dict[str, Any] | None]
"""Gives `prompt` and `text` of a model; None where what is asked before each token says that it is interrupted."""


class TextSamples:
    """A callback that logs a sample of text: after each validation, or every so many steps and at the last one.

    A sample that a signal interrupts is made when the run is resumed.
    """

    def __init__(self, sample: Sample | None, every_steps: int | None) -> None:
        """`sample`: on the rank that makes them, None on the others. `every_steps`: None: after each validation; 0: never."""
        self._sample, self._every_steps = sample, every_steps

    def on_fit_start(self, trainer: Any) -> None:
        """Make the sample that a signal has interrupted."""
        if trainer.progress.has_pending_sample:
            self._log_sample(trainer)

    def on_step_end(self, trainer: Any, result: Any) -> None:
        """A sample, if it is due by the number of steps."""
        if self._every_steps and (result.step % self._every_steps == 0 or result.step == trainer.max_steps):
            self._log_sample(trainer)

    def on_validation_end(self, trainer: Any, result: Any) -> None:
        """A sample, if each validation is followed by one."""
        if self._every_steps is None:
            self._log_sample(trainer)

    def _log_sample(self, trainer: Any) -> None:
        """For all ranks. A model of the user's own, or its tokenizer, may fail at what training never asks of it: that costs a
        warning, not the run.
        """
        world, step = trainer.world, trainer.progress.step

        def interrupted() -> bool:
            world.heartbeat.mark("sampling", step=step)
            return bool(world.stop_request)

        began, was_interrupted = time.perf_counter(), False
        with trainer.evaluating() as model:
            if self._sample is not None:
                try:
                    text = self._sample(model, interrupted)
                except Exception as error:
                    log.warning("step %d: no sample of text (%s: %s); training goes on", step, type(error).__name__, error)
                else:
                    was_interrupted = text is None
                    if text is not None:
                        trainer.log({"kind": "sample", "step": step, **text, "seconds": time.perf_counter() - began})
            [ranks_interrupted] = PendingSum([int(was_interrupted)], world).wait()
        trainer.progress.pending_sample_step = step if ranks_interrupted else 0


def sample_of(config: TrainingConfig, tokenizer: Any, model: nn.Module, dataset: Any) -> Sample | None:
    """Samples of text, where they are wanted and the model can give them; None otherwise.

    Where no prompt was given, they continue the beginning of `dataset`'s first row, or answer it where only answers carry loss;
    a row that gives none costs the samples and an INFO line, never the run. Raises ConfigError for a prompt of the user's own
    that does not fit.
    """
    tracking = config.tracking
    if 0 in (tracking.sample_tokens, tracking.sample_every_steps) or tracking.sample_prompt == "" or not can_generate(model):
        return None
    context = context_length(model) or config.data.sequence_length
    if tracking.sample_prompt is not None:
        prompt, prompt_tokens = given_prompt(tracking.sample_prompt, config.data, tokenizer, chats=are_conversations(dataset))
        if not 0 < len(prompt_tokens) < context:
            raise ConfigError(
                f"tracking.sample_prompt: {tracking.sample_prompt!r} has {counted(len(prompt_tokens), 'token')}; the "
                f'model\'s context has {context}, and one must be left to generate. Give another prompt, or "" for no samples'
            )
    else:
        first = dataset[0]
        row = (first if isinstance(first, Tensor) else first.input_ids[0]).tolist()
        most = min(PROMPT_TOKENS, config.data.sequence_length // 2, context - 1)
        prompt_tokens = prompt_before_answer(first, most=context - 1)
        if not prompt_tokens and (beginning := beginning_of(row, tokenizer, most=most - len(text_prefix(tokenizer)))):
            prompt_tokens = with_prefix(beginning, text_prefix(tokenizer))
        prompt = tokenizer.decode(prompt_tokens, skip_special_tokens=True)
        if not prompt_tokens:
            log.info(
                "no samples of text: the first row of data begins with no text to go on from; tracking.sample_prompt gives one"
            )
            return None
    return build_sample(
        tokenizer, prompt=prompt, prompt_tokens=prompt_tokens, max_new_tokens=tracking.sample_tokens, seed=config.seed
    )


def given_prompt(given: str, data: DataConfig, tokenizer: Any, *, chats: bool) -> tuple[str, list[int]]:
    """A prompt of the user's own as samples show it, and its tokens: text, or where the data are conversations (`chats`) a JSON
    list of messages, written by their template to be answered. Raises ConfigError, DataError.
    """
    if not chats or not _LIST_OF_OBJECTS.match(given):
        return given, prompt_ids(tokenizer, given)
    key = "tracking.sample_prompt"
    try:
        messages = read_messages(key, {"messages": json.loads(given)}, "messages")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{key}: {given!r} begins as a list of messages does, but is no JSON ({error}); write it as "
            '[{"role": "user", "content": "Hi"}]'
        ) from error
    text = ChatTemplate(data, tokenizer).prompt(key, messages)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens


def prompt_before_answer(row: Any, *, most: int) -> list[int]:
    """The tokens of a Batch of one row before the first that carries loss; none where the second one does, as in plain text,
    or where they are more than `most`.
    """
    if isinstance(row, Tensor):
        return []
    carries_loss = (row.targets[0] != IGNORED_TARGET).nonzero()
    length = int(carries_loss[0]) + 1 if len(carries_loss) else 0
    return row.input_ids[0, :length].tolist() if 1 < length <= most else []


def beginning_of(row: Sequence[int], tokenizer: Any, *, most: int) -> list[int]:
    """The first tokens of `row` that are text: at most `most`, whole characters and, if possible, whole words."""
    special = set(tokenizer.all_special_ids)
    text_tokens = [token for token in row if token not in special][: most + 1]
    decoded = [tokenizer.decode(text_tokens[:length], skip_special_tokens=True) for length in range(len(text_tokens) + 1)]
    whole = [n for n in range(1, min(most, len(text_tokens)) + 1) if decoded[n].strip() and REPLACEMENT not in decoded[n]]
    # A word is whole where white space follows it; scripts that do without are cut between any two characters.
    at_words = [n for n in whole if n + 1 < len(decoded) and decoded[n + 1][len(decoded[n]) :][:1].isspace()]
    return text_tokens[: max(at_words or whole, default=0)]


def build_sample(tokenizer: Any, *, prompt: str, prompt_tokens: Sequence[int], max_new_tokens: int, seed: int) -> Sample:
    """What continues `prompt`, drawn from a generator of its own: training does not change by it."""

    def sample(model: nn.Module, interrupted: Callable[[], bool]) -> dict[str, Any] | None:
        tokens: list[int] = []
        if interrupted():
            return None
        for token in generate(
            model,
            prompt_tokens,
            max_new_tokens=max_new_tokens,
            temperature=SAMPLE_TEMPERATURE,
            top_p=SAMPLE_TOP_P,
            seed=seed,
            eos_token_id={tokenizer.eos_token_id, *end_tokens(model)},
        ):
            tokens.append(token)
            if interrupted():
                return None
        # The last character may lack bytes that were never drawn.
        return {"prompt": prompt, "text": tokenizer.decode(tokens, skip_special_tokens=True).rstrip(REPLACEMENT)}

    return sample
