"""Conversations: their messages in records, and their text by a chat template, with the positions of the answers.

A template may mark the answers itself, with {% generation %} around the assistant's text. With any other template, an answer
is the difference between two renderings: of the turns before it, with the generation prompt, and of those up to the answer.
Each rendering must begin with the one before: a template that renders earlier turns differently later on is refused.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from dist_trainer.config.schema import DataConfig
from dist_trainer.data.templates import (
    BESIDE_MESSAGES,
    LossMaskedText,
    check_length,
    check_template,
    describe_type,
    missing_column,
    within_limits,
)
from dist_trainer.data.tokenizers import Tokenizer, read_chat_template, text_prefix
from dist_trainer.errors import DataError

log = logging.getLogger(__name__)

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASKS_FOR_DATE = "asks for today's date"
_WITHOUT_DATE = f'{{% macro strftime_now(_) %}}{{{{ raise_exception("{_ASKS_FOR_DATE}") }}}}{{% endmacro %}}\n'
"""Put before a template, to replace transformers' function for the date. Like that of any tag, its line end is not rendered."""
_MARKS = "{% generation %} and {% endgeneration %} around the assistant's text"

Message = dict[str, Any]
ASSISTANT = "assistant"
FLAGS = ("weight", "train", "training")
"""Keys of a message that say whether it is trained on: 1 or true, 0 or false."""
CONTENT_KEYS = (
    *("tool_calls", "function_call", "tools", "functions"),
    *("reasoning_content", "reasoning", "thinking", "refusal", "images", "audio", "videos"),
)
"""Keys of a message with further content. The chat template must render them, or they would be lost silently."""
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


class ChatTemplate:
    """Renders conversations, and finds the answers in them."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        """Raises DataError if there is no template."""
        self._tokenizer = tokenizer
        self.text = read_chat_template(config.chat_template) if config.chat_template else _required_template(config, tokenizer)
        self._name = (
            f"data.chat_template {config.chat_template}" if config.chat_template else f"the chat template of {config.tokenizer}"
        )
        check_template(self.text, self._name)
        self._has_marks = _GENERATION_TAG.search(self.text) is not None
        self._special = tuple(tokenizer.get_added_vocab())
        self._is_checked = False

    def __call__(self, where: str, messages: list[Message]) -> LossMaskedText:
        """The text of a conversation; its spans are the answers with their ends. Raises DataError naming `where`."""
        self._check_lost_content(where, messages)
        if self._has_marks:
            text, spans = self._render_with_marks(where, messages)
        else:
            text = self._render(where, messages)
            spans = self._answer_spans(where, messages, text)
        if spans and not self._is_checked:
            self._is_checked = True
            self._warn_of_other_eos(text[slice(*spans[-1])])
            self._warn_of_missing_prefix(text)
        return LossMaskedText(text, spans, is_complete=True)

    def prompt(self, where: str, messages: list[Message]) -> str:
        """The conversation so far, with the generation prompt. Raises DataError naming `where`."""
        return self._render(where, messages, add_generation_prompt=True, may_ask_for_date=True)

    def _answer_spans(self, where: str, messages: list[Message], whole: str) -> list[tuple[int, int]]:
        spans = []
        for number, message in enumerate(messages):
            if not is_trained_on(message):
                continue
            if number == 0:
                raise DataError(
                    f"{where}: the conversation begins with the assistant's message, and {self._name} does not mark "
                    f"answers; put a message before it, or name a data.chat_template with {_MARKS}"
                )
            before = self._render(where, messages[:number], add_generation_prompt=True)
            upto = whole if number == len(messages) - 1 else self._render(where, messages[: number + 1])
            if not (upto.startswith(before) and whole.startswith(upto)):
                raise DataError(
                    f"{where}: {self._name} renders earlier turns differently once later turns follow (message "
                    f"{number + 1} of {len(messages)}), so the answers cannot be located; name a data.chat_template with "
                    f"{_MARKS}, or give conversations of one answer each"
                )
            if not self._is_checked:
                self._check_generation_prompt(where, messages[:number], message["content"], before, upto)
            spans.append((len(before), self._end_of_turn(upto, len(before))))
        return spans

    def _end_of_turn(self, text: str, start: int) -> int:
        """The end of the answer that begins at `start` and ends `text`, without the line end that many templates put after the
        special token that ends a turn: generation stops at that token.
        """
        stripped = text[start:].rstrip()
        return start + len(stripped) if self._special and stripped.endswith(self._special) else len(text)

    def _check_generation_prompt(self, where: str, messages: list[Message], answer: str, before: str, upto: str) -> None:
        """Raises DataError if the template ignores add_generation_prompt: the speaker's name would count as the answer."""
        has_prompt = before != self._render(where, messages)
        if not has_prompt and not upto[len(before) :].lstrip().startswith(answer.strip()):
            raise DataError(
                f"{where}: {self._name} ignores add_generation_prompt, so the beginning of an answer cannot be located; let it "
                f"use add_generation_prompt, or put {_MARKS}, in a file that data.chat_template names"
            )

    def _warn_of_other_eos(self, answer: str) -> None:
        end = self._tokenizer.eos_token
        if not answer.rstrip().endswith(end):
            log.warning(
                "%s ends an answer with %r, not with the tokenizer's end-of-text token (%s), at which generation stops: it "
                "will not stop at the end of an answer. Set eos_token in tokenizer_config.json to what ends an answer",
                *(self._name, answer[-24:], end),
            )

    def _warn_of_missing_prefix(self, text: str) -> None:
        prefix = "".join(self._tokenizer.convert_ids_to_tokens(text_prefix(self._tokenizer)))
        if not text.startswith(prefix):
            log.warning(
                "the tokenizer puts %s before each text, but %s does not. If the model was trained with it, begin the template "
                "with {{ bos_token }}",
                *(prefix, self._name),
            )

    def _render(
        self, where: str, messages: list[Message], *, add_generation_prompt: bool = False, may_ask_for_date: bool = False
    ) -> str:
        try:
            text = within_limits(
                lambda: self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.text if may_ask_for_date else _WITHOUT_DATE + self.text,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
            return check_length(text)
        except Exception as error:  # templates raise what they like
            raise self._render_error(where, messages, error) from error

    def _render_with_marks(self, where: str, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans_of_texts = within_limits(
                lambda: render_jinja_template(
                    conversations=[messages],
                    chat_template=_WITHOUT_DATE + self.text,
                    return_assistant_tokens_mask=True,
                    **self._tokenizer.special_tokens_map,
                )
            )
            check_length(texts[0])
        except Exception as error:  # templates raise what they like
            raise self._render_error(where, messages, error) from error
        spans = [(int(start), int(end)) for start, end in spans_of_texts[0]]
        answers = [message for message in messages if message["role"] == ASSISTANT]
        if not all(map(is_trained_on, answers)):
            if len(spans) != len(answers):
                raise DataError(
                    f"{where}: {self._name} marks {len(spans)} parts of a conversation with {len(answers)} answers, so the one "
                    "that is not to be trained on (empty, or with a weight of 0) cannot be identified; remove it"
                )
            spans = [span for span, message in zip(spans, answers, strict=True) if is_trained_on(message)]
        return texts[0], [(start, end) for start, end in spans if end > start]

    def _check_lost_content(self, where: str, messages: list[Message]) -> None:
        """Raises DataError if a message has further content, such as a tool call, that the template does not render."""
        for number, message in enumerate(messages, start=1):
            for key in CONTENT_KEYS:
                if not message.get(key):
                    continue
                before = messages[: number - 1]
                without = {name: value for name, value in message.items() if name != key}
                try:
                    is_lost = self._render(where, [*before, message]) == self._render(where, [*before, without])
                except DataError:
                    continue  # the template uses the key: it refuses the message with it, or without it
                if is_lost:
                    raise DataError(
                        f'{where}: message {number} has "{key}", which {self._name} does not render, so it would be lost; name '
                        "a data.chat_template that renders it, put it into the content, or remove it"
                    )

    def _render_error(self, where: str, messages: list[Message], error: Exception) -> DataError:
        if str(error) == _ASKS_FOR_DATE:
            return DataError(
                f"{where}: {self._name} {_ASKS_FOR_DATE} (strftime_now), so the same conversations would give different "
                "text tomorrow, and the run could not resume; set data.chat_template to a copy with a fixed date (for "
                'Llama 3\'s, {% set date_string = "26 Jul 2024" %} as its first line is enough)'
            )
        roles = ", ".join(str(message["role"]) for message in messages[:8]) + (", ..." if len(messages) > 8 else "")
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return DataError(
            f"{where}: {self._name} refuses the messages (roles {roles}): {reason}; change the messages, or use "
            "another template (data.chat_template; of a checkpoint, chat_template.jinja in its folder)"
        )


def default_chat_template(tokenizer: Tokenizer) -> str | None:
    """The chat template of `tokenizer`, of several the default one; None if there is none."""
    templates = getattr(tokenizer, "chat_template", None)
    return (templates.get("default") if isinstance(templates, dict) else templates) or None


def _required_template(config: DataConfig, tokenizer: Tokenizer) -> str:
    template = default_chat_template(tokenizer)
    if template is None:
        which = "default " if getattr(tokenizer, "chat_template", None) else ""
        raise DataError(
            f"data.messages_column: {config.messages_column!r} is set, but the tokenizer {config.tokenizer} has no {which}"
            "chat template to write conversations with; name a file with one by data.chat_template (such as "
            "configs/plain_chat.jinja), or the tokenizer of a chat model"
        )
    return template


def read_messages(where: str, record: dict[str, Any], column: str) -> list[Message]:
    """The messages of a record. Raises DataError naming `where` and the problem."""
    if column not in record:
        raise missing_column(column, list(record), where)
    messages = record[column]
    if isinstance(messages, dict) and messages and all(isinstance(part, list) for part in messages.values()):
        # `datasets` stores lists of records declared as a Sequence as a list per field.
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    if not isinstance(messages, list):
        raise DataError(
            f'{where}: the column {column!r} holds {describe_type(messages)}, not a list of {{"role", "content"}} messages'
        )
    if not messages:
        raise DataError(f"{where}: the conversation in {column!r} has no message; remove the record")
    for other in BESIDE_MESSAGES:
        if other != column and record.get(other) not in (None, "", "[]", []):
            raise DataError(
                f"{where}: the column {other!r} has content that would not be part of the conversation; write it into a "
                "system message, and remove the column"
            )
    return [_message(where, f"message {number} in {column!r}", message) for number, message in enumerate(messages, start=1)]


def is_trained_on(message: Message) -> bool:
    """Whether it is an answer of the assistant that is neither excluded by a flag nor empty."""
    has_content = message["content"].strip() or any(message.get(key) for key in CONTENT_KEYS)
    return message["role"] == ASSISTANT and bool(has_content) and all(message.get(flag, True) for flag in FLAGS)


def _message(where: str, name: str, message: Any) -> Message:
    """The message with "role" and "content" as text and valid flags. Raises DataError naming place and message."""
    if not isinstance(message, dict):
        raise DataError(f'{where}: {name} is {describe_type(message)}, not an object with "role" and "content"')
    # In tables each message has the fields of all messages.
    message = {key: value for key, value in message.items() if value is not None or key in ("role", "content")}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(where, name, message)
    if message.get("content") is None and (message.get("tool_calls") or message.get("function_call")):
        message["content"] = ""
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            what = f"holds {describe_type(message[key])}, not text" if key in message else f"is missing ({', '.join(message)})"
            raise DataError(f'{where}: "{key}" of {name} {what}; each message needs "role" and "content"')
    for flag in FLAGS:
        if message.get(flag, 0) not in (0, 1):
            raise DataError(
                f'{where}: "{flag}" of {name} is {message[flag]!r}; it must be 1 or true (trained on), or 0 or false (not)'
            )
        if message.get(flag) and message["role"] != ASSISTANT:
            raise DataError(
                f'{where}: "{flag}" of {name} asks to train on a message of the {message["role"]}, but only messages of '
                f"the {ASSISTANT} are trained on; remove it, or set it to 0"
            )
    return message


def _from_sharegpt(where: str, name: str, message: Message) -> Message:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise DataError(f'{where}: {name} is "from" {speaker!r}; known are {", ".join(SHAREGPT_ROLES)}')
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[speaker], "content": message.get("value"), **others}


def _with_parsed_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object: OpenAI's are JSON, which templates write themselves."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (TypeError, KeyError, ValueError, RecursionError):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}
