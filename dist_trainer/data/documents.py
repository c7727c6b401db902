"""What a record becomes: text, a prompt with its completion, or a conversation."""

from __future__ import annotations

import json
from typing import Any

from dist_trainer.config.schema import DataConfig
from dist_trainer.data.chat import ChatTemplate, read_messages
from dist_trainer.data.templates import (
    LossMaskedText,
    RecordFormatter,
    RecordToText,
    completion_formatter,
    completion_template_of,
    text_formatter,
)
from dist_trainer.data.tokenizers import Tokenizer
from dist_trainer.errors import ConfigError


def record_formatter(config: DataConfig, tokenizer: Tokenizer) -> RecordFormatter:
    """The formatter that `config` describes. Raises DataError, ConfigError."""
    if config.messages_column is not None:
        return _of_conversations(config, config.messages_column, tokenizer)
    if config.chat_template is not None:
        raise ConfigError(
            f"data.chat_template: {config.chat_template!r} is set, but {config.dataset} has no column named messages or "
            "conversations; name its column by data.messages_column, or set data.chat_template to null"
        )
    text = text_formatter(config.text_column, config.template)
    if (completion_template := completion_template_of(config)) is not None:
        return _of_completions(config, completion_template, text)
    return RecordFormatter(text, json.dumps([config.text_column, config.template]))


def _of_conversations(config: DataConfig, column: str, tokenizer: Tokenizer) -> RecordFormatter:
    template = ChatTemplate(config, tokenizer)

    def make(where: str, record: dict[str, Any]) -> LossMaskedText:
        return template(where, read_messages(where, record, column))

    parts = [
        "messages, with their flags",
        column,
        template.text,
        sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items()),
    ]
    return RecordFormatter(make, json.dumps(parts), has_loss_mask=True)


def _of_completions(config: DataConfig, completion_template: str, prompt: RecordToText) -> RecordFormatter:
    completion = completion_formatter(completion_template)

    def make(where: str, record: dict[str, Any]) -> LossMaskedText:
        before, after = str(prompt(where, record)), completion(where, record)
        text = before + after
        # An empty completion would train the model to answer nothing.
        return LossMaskedText(text, [(len(before), len(text))] if after.strip() else [], is_complete=False)

    parts = ["completion, not an empty one", config.text_column, config.template, completion_template]
    return RecordFormatter(make, json.dumps(parts), has_loss_mask=True)
