"""Conversations to text by a chat template, with where in it the assistant speaks.

A template that marks this itself, by {% generation %} around what the assistant says, is taken at its word. With any other,
an answer is what stands between the conversation before it, with the generation prompt, and the conversation with it. That
is told from growing beginnings of the conversation, each of which must begin with the one before. Where a template writes
earlier messages otherwise once others follow, nothing is guessed: it is refused.
"""

from __future__ import annotations

import logging
import re

from dist_trainer.config.schema import DataConfig
from dist_trainer.data.loss_mask import LossMaskedText
from dist_trainer.data.messages import ASSISTANT, SAID_BESIDE_CONTENT, Message, is_learnt
from dist_trainer.data.template_limits import check_length, check_template, within_limits
from dist_trainer.data.tokenizers import Tokenizer, read_chat_template, text_prefix
from dist_trainer.errors import DataError

log = logging.getLogger(__name__)

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASKS_FOR_DATE = "asks for today's date"
_WITHOUT_DATE = f'{{% macro strftime_now(_) %}}{{{{ raise_exception("{_ASKS_FOR_DATE}") }}}}{{% endmacro %}}\n'
"""Goes before a template, in place of transformers' function for the date. Like any tag's, its line end is not written."""
_MARKS = "{% generation %} and {% endgeneration %} around what the assistant says"


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


def own_template(tokenizer: Tokenizer) -> str | None:
    """The chat template that came with `tokenizer`, of several the default one; None where there is none."""
    templates = getattr(tokenizer, "chat_template", None)
    return (templates.get("default") if isinstance(templates, dict) else templates) or None


def _required_template(config: DataConfig, tokenizer: Tokenizer) -> str:
    template = own_template(tokenizer)
    if template is None:
        which = "default " if getattr(tokenizer, "chat_template", None) else ""
        raise DataError(
            f"data.messages_column: {config.messages_column!r} is set, but the tokenizer {config.tokenizer} has no {which}"
            "chat template to write conversations with; name a file with one by data.chat_template (such as "
            "configs/plain_chat.jinja), or the tokenizer of a chat model"
        )
    return template
