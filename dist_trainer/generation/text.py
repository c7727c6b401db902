"""Generates text: a model and its tokenizer continue a prompt, or answer it in a chat, in pieces of complete characters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_trainer.config.schema import DataConfig
from dist_trainer.data.chat import ChatTemplate, default_chat_template
from dist_trainer.data.messages import Message
from dist_trainer.data.tokenizers import Tokenizer, prompt_ids
from dist_trainer.errors import ConfigError
from dist_trainer.generation.decoding import DecodingOptions, context_length, end_tokens, generate, prompt_too_long

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes incomplete UTF-8 to."""
CONTEXT_TOKENS = 6
"""Prompt tokens that are decoded together with the first new one: enough for any character, and for the space before it."""


class TextGenerator:
    """A model, its tokenizer, and how tokens are drawn; with `chat`, the conversation so far."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        options: DecodingOptions,
        *,
        chat: ChatTemplate | None = None,
        system: str | None = None,
    ) -> None:
        """`chat` renders each prompt as messages to be answered, after the `system` message."""
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.chat = chat
        self.system_messages = [] if system is None else [message("system", system)]
        self.history: list[Message] = []
        """The chat's questions and answers before the next prompt."""
        self.context_length = context_length(model)
        self.end_tokens = {tokenizer.eos_token_id, *end_tokens(model)}

    def prompt_tokens(self, text: str) -> list[int]:
        """Ids of `text` with the prefix used in training; in a chat, those of the entire rendered conversation."""
        if self.chat is None:
            return prompt_ids(self.tokenizer, text)
        rendered = self.chat.prompt("--chat", [*self.system_messages, *self.history, message("user", text)])
        return self.tokenizer.encode(rendered, add_special_tokens=False)

    def length_problem(self, text: str) -> str | None:
        """Why the prompt `text` leaves no room for a continuation; None if it does."""
        length = len(self.prompt_tokens(text))
        has_room = self.context_length is None or length < self.context_length
        return None if has_room else prompt_too_long(length, self.context_length)

    def remember(self, question: str, answer: str) -> None:
        """Add these to the conversation before the chat's next prompt."""
        self.history += [message("user", question), message("assistant", answer)]

    def stream(self, text: str) -> TextStream:
        """The continuation of `text`, or the answer to it."""
        return TextStream(self, self.prompt_tokens(text))


class TextStream:
    """Iterates once over pieces of text, each of complete characters: one character may need several tokens."""

    def __init__(self, generator: TextGenerator, prompt_tokens: list[int]) -> None:
        self.generator, self.prompt_tokens = generator, prompt_tokens
        self.new_tokens: list[int] = []
        self.ended_by = "interrupted"
        """`end_token`, `max_new_tokens` or `context` after the last piece."""

    def __iter__(self) -> Iterator[str]:
        ids = list(self.prompt_tokens)
        # Only tokens from `start` on are decoded. Those before `known` were printed; they decide about spaces in between.
        start, known = max(0, len(ids) - CONTEXT_TOKENS), len(ids)
        generator = self.generator
        for token in generate(generator.model, self.prompt_tokens, generator.options, end_token_ids=generator.end_tokens):
            self.new_tokens.append(token)
            ids.append(token)
            before, now = self._decode(ids[start:known]), self._decode(ids[start:])
            if len(now) > len(before) and not now.endswith(REPLACEMENT):
                yield now[len(before) :]
                start, known = known, len(ids)
        # The last tokens may end within a character.
        if rest := self._decode(ids[start:])[len(self._decode(ids[start:known])) :].rstrip(REPLACEMENT):
            yield rest
        self.ended_by = self._end_reason()

    def _decode(self, tokens: list[int]) -> str:
        return self.generator.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _end_reason(self) -> str:
        if len(self.new_tokens) == self.generator.options.max_new_tokens:
            return "max_new_tokens"
        return "context" if len(self.prompt_tokens) + len(self.new_tokens) == self.generator.context_length else "end_token"


def chat_template(tokenizer: Tokenizer, folder: Path) -> ChatTemplate:
    """The template of the tokenizer in `folder`. Raises ConfigError if it has none."""
    if default_chat_template(tokenizer) is None:
        raise ConfigError(
            f"--chat: the tokenizer in {folder} has no chat template; leave out --chat, or put a template next to the "
            "tokenizer as chat_template.jinja"
        )
    return ChatTemplate(DataConfig(tokenizer=str(folder)), tokenizer)


def message(role: str, content: str) -> Message:
    """One message of a conversation."""
    return {"role": role, "content": content}
