"""What a model makes of a prompt: the text that continues it, or of a chat the answer, in pieces as they become whole."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_trainer.config.schema import DataConfig
from dist_trainer.data.chat import ChatTemplate, Message, default_chat_template
from dist_trainer.data.tokenizers import Tokenizer, prompt_ids
from dist_trainer.errors import ConfigError, counted
from dist_trainer.generation.decoding import context_of, end_tokens, generate
from dist_trainer.generation.samples import BROKEN

CONTEXT_TOKENS = 6
"""Tokens of the prompt that are decoded together with the first new one: enough for any character, and for its space."""


class TextGenerator:
    """A model, its tokenizer, and how tokens are to be drawn."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        arguments: argparse.Namespace,
        *,
        chat: ChatTemplate | None = None,
    ) -> None:
        """`chat`: what writes prompts as messages to be answered."""
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        self.chat = chat
        self.opening = [] if arguments.system is None else [message("system", arguments.system)]
        """What every chat begins with."""
        self.earlier: list[Message] = []
        """Messages of a chat before the next prompt."""
        self.context = context_of(model)
        """Positions; None: without limit."""
        self.ends = {tokenizer.eos_token_id, *end_tokens(model)}

    def prompt_tokens(self, text: str) -> list[int]:
        """Ids of `text`, begun as in training. Of a chat those of the whole conversation, which its template begins."""
        if self.chat is not None:
            text = self.chat.prompt("--chat", [*self.opening, *self.earlier, message("user", text)])
            return self.tokenizer.encode(text, add_special_tokens=False)
        return prompt_ids(self.tokenizer, text)

    def lack_of_room(self, text: str) -> str | None:
        """Why nothing can follow `text`; None where something can."""
        length = len(self.prompt_tokens(text))
        if self.context is None or length < self.context:
            return None
        return f"the prompt has {counted(length, 'token')}; the model's context is {self.context}: shorten it"

    def keep(self, question: str, answer: str) -> None:
        """The chat's next prompt comes after these."""
        self.earlier += [message("user", question), message("assistant", answer)]

    def continuation(self, text: str) -> TextStream:
        """What follows `text`."""
        return TextStream(self, self.prompt_tokens(text))


class TextStream:
    """Pieces of text as they become whole: a character may need several tokens. To be iterated once."""

    def __init__(self, writer: TextGenerator, prompt_tokens: list[int]) -> None:
        self.writer, self.prompt_tokens = writer, prompt_tokens
        self.tokens: list[int] = []
        """New ones so far."""
        self.ended_by = "interrupted"
        """end_token, max_new_tokens or context, once it has ended."""

    def __iter__(self) -> Iterator[str]:
        arguments, ids = self.writer.arguments, list(self.prompt_tokens)
        # Only tokens from `start` on are decoded: those before `known` once more, for what they tell of spaces between.
        start, known = max(0, len(ids) - CONTEXT_TOKENS), len(ids)
        for token in generate(
            self.writer.model,
            self.prompt_tokens,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            eos_token_id=self.writer.ends,
        ):
            self.tokens.append(token)
            ids.append(token)
            before, now = self._decoded(ids[start:known]), self._decoded(ids[start:])
            if len(now) > len(before) and not now.endswith(BROKEN):
                yield now[len(before) :]
                start, known = known, len(ids)
        # What is left is no whole character, or more of them that end in one.
        if rest := self._decoded(ids[start:])[len(self._decoded(ids[start:known])) :].rstrip(BROKEN):
            yield rest
        self.ended_by = self._reason()

    def _decoded(self, tokens: list[int]) -> str:
        return self.writer.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _reason(self) -> str:
        if len(self.tokens) == self.writer.arguments.max_new_tokens:
            return "max_new_tokens"
        room = None if self.writer.context is None else self.writer.context - len(self.prompt_tokens)
        return "context" if len(self.tokens) == room else "end_token"


def chat_template(tokenizer: Tokenizer, folder: Path) -> ChatTemplate:
    """The tokenizer's own. Raises ConfigError where it has none."""
    if default_chat_template(tokenizer) is None:
        raise ConfigError(
            f"--chat: the tokenizer in {folder} has no chat template to write messages with; leave --chat out, or put a "
            "template beside the tokenizer as chat_template.jinja"
        )
    return ChatTemplate(DataConfig(tokenizer=str(folder)), tokenizer)


def message(role: str, content: str) -> Message:
    """One of a conversation."""
    return {"role": role, "content": content}
