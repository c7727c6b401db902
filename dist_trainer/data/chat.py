"""`ChatTemplate`: the text of conversations, with the positions of the answers.

A template may mark the answers itself, with {% generation %} around the assistant's text. With any other template, an answer
is the difference between two renderings: of the turns before it, with the generation prompt, and of those up to the answer.
Each rendering must begin with the one before: a template that renders earlier turns differently later on is refused.

Templates are programs and may come from a stranger, so there are limits on what they do.
"""

from __future__ import annotations

import contextlib
import logging
import re
import resource
import signal
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from dist_trainer.config.schema import DataConfig
from dist_trainer.data.messages import ASSISTANT, CONTENT_KEYS, Message, is_trained_on
from dist_trainer.data.templates import LossMaskedText
from dist_trainer.data.tokenizers import Tokenizer, read_chat_template, text_prefix
from dist_trainer.errors import DataError, type_named

log = logging.getLogger(__name__)

MAX_SECONDS = 5.0
"""Limit on the CPU time for rendering a conversation, which normally takes milliseconds."""
MAX_BYTES = 1 << 30
"""Limit on the memory that rendering may add to the process."""
MAX_CHARACTERS = 1 << 26
"""Limit on the length of the rendered text."""
_MEMORY_IN_USE = Path("/proc/self/statm")
Result = TypeVar("Result")
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASKS_FOR_DATE = "asks for today's date"
_WITHOUT_DATE = f'{{% macro strftime_now(_) %}}{{{{ raise_exception("{_ASKS_FOR_DATE}") }}}}{{% endmacro %}}\n'
"""Prepended to a template, to replace transformers' date function. Like any tag's, its line end is not rendered."""
_MARKS = "{% generation %} and {% endgeneration %} around the assistant's text"


class ChatTemplate:
    """Renders conversations and locates the answers in them."""

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
        """The text of a conversation; its spans are the answers with their end tokens. Raises DataError naming `where`."""
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
        """The end of the answer from `start` to the end of `text`, without the newline that many templates put after the
        end-of-turn token: generation stops at that token.
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
        except Exception as error:  # a template can raise anything
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
        except Exception as error:  # a template can raise anything
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
        """Raises DataError if a message has other content, such as a tool call, that the template does not render."""
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
    """The chat template of `tokenizer` (the default one if it has several); None if there is none."""
    templates = getattr(tokenizer, "chat_template", None)
    return (templates.get("default") if isinstance(templates, dict) else templates) or None


def _required_template(config: DataConfig, tokenizer: Tokenizer) -> str:
    template = default_chat_template(tokenizer)
    if template is None:
        which = "default " if getattr(tokenizer, "chat_template", None) else ""
        raise DataError(
            f"data.messages_column: {config.messages_column!r} is set, but the tokenizer {config.tokenizer} has no {which}"
            "chat template to format conversations with; set data.chat_template to a file with one (such as "
            "configs/plain_chat.jinja), or use the tokenizer of a chat model"
        )
    return template


class TemplateLimitError(DataError):
    """A chat template exceeds the limits on time, memory or length."""


def check_template(template: object, name: str) -> None:
    """Raises DataError if the chat template `name` is not text, or raises numbers to powers, which cannot be interrupted.

    Syntax errors are left to rendering.
    """
    import jinja2

    if not isinstance(template, str):
        raise DataError(f"{name} is {type_named(template)}, not the text of a Jinja template")
    before = ""
    with contextlib.suppress(jinja2.TemplateSyntaxError):
        for _, kind, value in jinja2.Environment().lex(template):
            if kind == "operator" and value == "**" and before not in ("(", ","):  # after these it unpacks arguments
                raise DataError(f"{name} raises a number to a power (**), which may never finish; use a template without it")
            before = before if kind == "whitespace" else value


def within_limits(render: Callable[[], Result]) -> Result:
    """The result of `render`. Raises TemplateLimitError if it takes more than MAX_SECONDS or MAX_BYTES.

    Time is limited in the main thread only, memory only on Linux.
    """
    try:
        with _limited_memory(), _limited_time():
            return render()
    except MemoryError:
        raise TemplateLimitError(f"it takes more than {MAX_BYTES >> 20:,} MiB of memory") from None


def check_length(text: str) -> str:
    """Returns the rendered `text`. Raises TemplateLimitError if it has more than MAX_CHARACTERS."""
    if len(text) > MAX_CHARACTERS:
        raise TemplateLimitError(f"it writes {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    return text


@contextlib.contextmanager
def _limited_time() -> Generator[None]:
    """Measured in CPU time, which does not depend on the load of the machine."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TemplateLimitError(f"it takes more than {MAX_SECONDS:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    try:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _limited_memory() -> Generator[None]:
    """Limits the address space: any allocation beyond it fails."""
    if not _MEMORY_IN_USE.exists():
        yield
        return
    in_use = int(_MEMORY_IN_USE.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, in_use + MAX_BYTES) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
