"""Conversations to text by a chat template, with where in it the assistant speaks.

A template that marks this itself, by {% generation %} around what the assistant says, is taken at its word. With any other,
an answer is what stands between the conversation before it, with the generation prompt, and the conversation with it. That
is told from growing beginnings of the conversation, each of which must begin with the one before. Where a template writes
earlier messages otherwise once others follow, nothing is guessed: it is refused.
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

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASKS_FOR_DATE = "asks for today's date"
_WITHOUT_DATE = f'{{% macro strftime_now(_) %}}{{{{ raise_exception("{_ASKS_FOR_DATE}") }}}}{{% endmacro %}}\n'
"""Goes before a template, in place of transformers' function for the date. Like any tag's, its line end is not written."""
_MARKS = "{% generation %} and {% endgeneration %} around what the assistant says"

Message = dict[str, Any]
ASSISTANT = "assistant"
FLAGS = ("weight", "train", "training")
"""Keys of a message that say whether it is learnt: 1 or true, 0 or false."""
SAID_BESIDE_CONTENT = (
    *("tool_calls", "function_call", "tools", "functions"),
    *("reasoning_content", "reasoning", "thinking", "refusal", "images", "audio", "videos"),
)
"""Keys of a message that say something too. The chat template must write them, or they would be lost without a word."""
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


class ChatTemplate:
    """Writes conversations, and knows where the assistant speaks in them."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        """Raises DataError where there is no template to write them with."""
        self._tokenizer = tokenizer
        self.text = read_chat_template(config.chat_template) if config.chat_template else _required_template(config, tokenizer)
        self._name = (
            f"data.chat_template {config.chat_template}" if config.chat_template else f"the chat template of {config.tokenizer}"
        )
        check_template(self.text, self._name)
        self._is_marked = _MARKED.search(self.text) is not None
        self._special = tuple(tokenizer.get_added_vocab())
        self._is_tried = False

    def __call__(self, where: str, messages: list[Message]) -> LossMaskedText:
        """The conversation as text; the spans are the answers, each with what ends it. Raises DataError naming `where`."""
        self._refuse_lost_parts(where, messages)
        if self._is_marked:
            text, spans = self._rendered_with_marks(where, messages)
        else:
            text = self._rendered(where, messages)
            spans = self._spans(where, messages, text)
        if spans and not self._is_tried:
            self._is_tried = True
            self._warn_of_other_end(text[slice(*spans[-1])])
            self._warn_of_missing_prefix(text)
        return LossMaskedText(text, spans, is_complete=True)

    def prompt(self, where: str, messages: list[Message]) -> str:
        """The conversation so far, and what begins the assistant's answer. Raises DataError naming `where`."""
        return self._rendered(where, messages, add_generation_prompt=True, may_ask_for_date=True)

    def _spans(self, where: str, messages: list[Message], whole: str) -> list[tuple[int, int]]:
        spans = []
        for number, message in enumerate(messages):
            if not is_learnt(message):
                continue
            if number == 0:
                raise DataError(
                    f"{where}: the conversation begins with the assistant's message, and {self._name} does not say where that "
                    f"stands; put a message to answer before it, or name a data.chat_template with {_MARKS}"
                )
            before = self._rendered(where, messages[:number], add_generation_prompt=True)
            upto = whole if number == len(messages) - 1 else self._rendered(where, messages[: number + 1])
            if not (upto.startswith(before) and whole.startswith(upto)):
                raise DataError(
                    f"{where}: {self._name} writes the beginning of a conversation otherwise when more follows (message "
                    f"{number + 1} of {len(messages)}), so where the answers stand cannot be told; name a data.chat_template "
                    f"with {_MARKS}, or give conversations of one answer each"
                )
            if not self._is_tried:
                self._refuse_without_generation_prompt(where, messages[:number], message["content"], before, upto)
            spans.append((len(before), self._end_of_turn(upto, len(before))))
        return spans

    def _end_of_turn(self, text: str, start: int) -> int:
        """The end of `text`, which is that of the answer from `start` on; but what is sampled ends with the special token that
        ends a turn: the line end that many templates put behind it is nothing to learn.
        """
        stripped = text[start:].rstrip()
        return start + len(stripped) if self._special and stripped.endswith(self._special) else len(text)

    def _refuse_without_generation_prompt(
        self, where: str, messages: list[Message], answer: str, before: str, upto: str
    ) -> None:
        """Some templates do not heed add_generation_prompt: what names the speaker would then count as his answer."""
        heeds = before != self._rendered(where, messages)
        if not heeds and not upto[len(before) :].lstrip().startswith(answer.strip()):
            raise DataError(
                f"{where}: {self._name} has no generation prompt, so what comes before an answer cannot be told from it; let "
                f"it heed add_generation_prompt, or put {_MARKS}, in a file that data.chat_template names"
            )

    def _warn_of_other_end(self, answer: str) -> None:
        end = self._tokenizer.eos_token
        if not answer.rstrip().endswith(end):
            log.warning(
                "%s ends an answer with %r, not with the tokenizer's end-of-text token (%s), at which generation stops: it "
                "will not stop where an answer ends. Set eos_token in the tokenizer's tokenizer_config.json to what ends one",
                *(self._name, answer[-24:], end),
            )

    def _warn_of_missing_prefix(self, text: str) -> None:
        prefix = "".join(self._tokenizer.convert_ids_to_tokens(text_prefix(self._tokenizer)))
        if not text.startswith(prefix):
            log.warning(
                "the tokenizer puts %s before each text, but %s does not, and its text is taken as it is. If the model was "
                "trained with it, begin the template with {{ bos_token }}",
                *(prefix, self._name),
            )

    def _rendered(
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
            raise self._refusal(where, messages, error) from error

    def _rendered_with_marks(self, where: str, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
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
            raise self._refusal(where, messages, error) from error
        spans = [(int(start), int(end)) for start, end in spans_of_texts[0]]
        answers = [message for message in messages if message["role"] == ASSISTANT]
        if not all(map(is_learnt, answers)):
            if len(spans) != len(answers):
                raise DataError(
                    f"{where}: {self._name} marks {len(spans)} parts of a conversation with {len(answers)} answers, so the one "
                    "that is not to be trained on (empty, or with a weight of 0) cannot be told from the others; remove it"
                )
            spans = [span for span, message in zip(spans, answers, strict=True) if is_learnt(message)]
        return texts[0], [(start, end) for start, end in spans if end > start]

    def _refuse_lost_parts(self, where: str, messages: list[Message]) -> None:
        """Raises DataError where a message says something beside its content that is not written: a tool call, say."""
        for number, message in enumerate(messages, start=1):
            for key in SAID_BESIDE_CONTENT:
                if not message.get(key):
                    continue
                before = messages[: number - 1]
                without = {name: value for name, value in message.items() if name != key}
                try:
                    is_lost = self._rendered(where, [*before, message]) == self._rendered(where, [*before, without])
                except DataError:
                    continue  # the template heeds the key: it refuses the message with it, or without it
                if is_lost:
                    raise DataError(
                        f'{where}: message {number} has "{key}", which {self._name} does not write, so it would be lost; name '
                        "a data.chat_template that writes it, put it into the content, or remove it"
                    )

    def _refusal(self, where: str, messages: list[Message], error: Exception) -> DataError:
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
    """The chat template that came with `tokenizer`, of several the default one; None where there is none."""
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
    """The messages of a record. Raises DataError naming the place, and what is wrong with them."""
    if column not in record:
        raise missing_column(column, list(record), where)
    messages = record[column]
    if isinstance(messages, dict) and messages and all(isinstance(part, list) for part in messages.values()):
        # As `datasets` keeps lists of records that are declared as a Sequence: a list of each field.
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


def is_learnt(message: Message) -> bool:
    """Whether it is an answer to learn: the assistant's, not flagged as none, not empty (that would teach to say nothing)."""
    says_something = message["content"].strip() or any(message.get(key) for key in SAID_BESIDE_CONTENT)
    return message["role"] == ASSISTANT and bool(says_something) and all(message.get(flag, True) for flag in FLAGS)


def _message(where: str, name: str, message: Any) -> Message:
    """With "role" and "content" that are text, and flags that are yes or no. Raises DataError naming place and message."""
    if not isinstance(message, dict):
        raise DataError(f'{where}: {name} is {describe_type(message)}, not an object with "role" and "content"')
    # Tables give each message every field that any message has.
    message = {key: value for key, value in message.items() if value is not None or key in ("role", "content")}
    if "role" not in message and "from" in message:
        message = _of_sharegpt(where, name, message)
    if message.get("content") is None and (message.get("tool_calls") or message.get("function_call")):
        message["content"] = ""
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
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


def _of_sharegpt(where: str, name: str, message: Message) -> Message:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise DataError(f'{where}: {name} is "from" {speaker!r}; known are {", ".join(SHAREGPT_ROLES)}')
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[speaker], "content": message.get("value"), **others}


def _with_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object, which templates write as JSON themselves; OpenAI gives the JSON."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (TypeError, KeyError, ValueError, RecursionError):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}
