"""The text of a record: one column, or a template of several, such as "{context}\\n{answers[text][0]}"."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dist_trainer.config.schema import DataConfig
from dist_trainer.config.values import ALPACA, parse_template
from dist_trainer.data.text_file import LongText
from dist_trainer.errors import DataError, type_named

BESIDE_MESSAGES = ("tools", "functions", "system")
"""Columns that some conversation datasets have in addition to the messages; their content would be lost."""
PROMPT_COLUMNS = ("instruction", "input", "prompt", "question", "query", "context")
COMPLETION_COLUMNS = ("output", "completion", "response", "answer")

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_COMPLETION = "{output}"
ALPACA_COLUMNS = {"instruction", "output"}
NOT_IN_ALPACA_PROMPT = ("system", "history")
"""Columns that some datasets have in addition to Alpaca's."""
CONVERSATION_COLUMNS = ("messages", "conversations")


@dataclass(frozen=True)
class LossMaskedText:
    """A document with a loss mask: only parts of it are trained on."""

    text: str
    loss_spans: Sequence[tuple[int, int]]
    """[start, end) in characters, ascending, disjoint."""
    is_complete: bool
    """Whether the text already includes its BOS and EOS; otherwise they are added, and the EOS is trained on if there are any
    `loss_spans`."""


RecordToText = Callable[[str, dict[str, Any]], str | LongText | LossMaskedText]
"""(place, record) to text; raises DataError naming the place."""


@dataclass(frozen=True)
class RecordFormatter:
    """Turns records into documents."""

    text: RecordToText
    identity: str
    """Differs between formatters that make different documents of the same record."""
    has_loss_mask: bool = False
    """Whether `text` returns LossMaskedTexts."""


def infer_layout(config: DataConfig, columns: Collection[str]) -> DataConfig:
    """`config` with the keys that well-known column names imply: Alpaca's, or those of conversations.

    Unchanged if the config says how records become text, or if there is a column `text`.
    """
    is_set = config.text_column != DataConfig.text_column or config.text_column in columns
    if is_set or any(key is not None for key in (config.template, config.completion_template, config.messages_column)):
        return config
    if set(columns) >= ALPACA_COLUMNS:
        return replace(config, template=ALPACA)
    conversations = next((column for column in CONVERSATION_COLUMNS if column in columns), None)
    return config if conversations is None else replace(config, messages_column=conversations)


def text_formatter(column: str, template: str | None) -> RecordToText:
    """The function that returns a record's text, by data.text_column or data.template."""
    if template == ALPACA:
        return _alpaca_prompt
    return _column(column) if template is None else template_formatter(template)


def completion_template_of(config: DataConfig) -> str | None:
    """data.completion_template, or that of Alpaca's records."""
    return config.completion_template or (ALPACA_COMPLETION if config.template == ALPACA else None)


def _alpaca_prompt(where: str, record: dict[str, Any]) -> str:
    for column in NOT_IN_ALPACA_PROMPT:
        if record.get(column):
            raise DataError(
                f"{where}: the column {column!r} has content that Alpaca's prompt has no place for; write it into the "
                "instruction, or set data.template and data.completion_template"
            )
    template = ALPACA_PROMPT_WITH_INPUT if record.get("input") else ALPACA_PROMPT
    return template_formatter(template)(where, record)


def required_columns(config: DataConfig) -> list[str]:
    """The columns that `config` needs in each record."""
    if config.messages_column is not None:
        return [config.messages_column]
    prompt = ALPACA_PROMPT if config.template == ALPACA else config.template
    templates = [template for template in (prompt, completion_template_of(config)) if template is not None]
    columns = {name for template in templates for name, _ in parse_template(template) if name is not None}
    if config.template is None:
        columns.add(config.text_column)
    return sorted(columns)


def optional_columns(config: DataConfig) -> list[str]:
    """The columns that `config` reads if they exist."""
    if config.template == ALPACA:
        return ["input", *NOT_IN_ALPACA_PROMPT]
    return list(BESIDE_MESSAGES) if config.messages_column is not None else []


def missing_column(column: str, present: list[str], where: str) -> DataError:
    """The error for a column that does not exist."""
    return DataError(
        f"{where}: there is no column {column!r}, only {', '.join(map(repr, present)) or 'none'}; {_how_to_read(present)}"
    )


def _how_to_read(columns: list[str]) -> str:
    """The keys to set: those for prompts and completions, if the columns have typical names of such columns."""
    prompts = [name for name in columns if name in PROMPT_COLUMNS]
    completion = next((name for name in columns if name in COMPLETION_COLUMNS), None)
    if prompts and completion is not None:
        prompt = "\\n".join(f"{{{name}}}" for name in prompts)
        return f'set --data.template "{prompt}\\n" and --data.completion_template "{{{completion}}}" to train on {completion!r}'
    return (
        "set --data.text_column, --data.template for text of several columns, or --data.messages_column for conversations "
        "(null: for none)"
    )


def _column(column: str) -> RecordToText:
    def read(where: str, record: dict[str, Any]) -> str | LongText:
        if column not in record:
            raise missing_column(column, list(record), where)
        value = record[column]
        if not isinstance(value, str | LongText):
            remedy = "; a list of messages is read by --data.messages_column" if isinstance(value, list) else ""
            raise DataError(f"{where}: the column {column!r} holds {describe_type(value)}, not text{remedy}")
        return value

    return read


def template_formatter(template: str, *, key: str = "data.template") -> Callable[[str, dict[str, Any]], str]:
    """The function that fills in `template`, which is in the config under `key`."""
    parts = parse_template(template, key=key)

    def fill(where: str, record: dict[str, Any]) -> str:
        return "".join(
            literal if name is None else _look_up(record, name, literal, f"{where}: {key}") for name, literal in parts
        )

    return fill


def _look_up(record: dict[str, Any], name: str, indices: str, where: str) -> str:
    """`where` names the place and the template's key."""
    if name not in record:
        raise missing_column(name, list(record), where)
    value = record[name]
    for index in re.findall(r"\[([^\[\]]+)\]", indices):
        try:
            value = value[int(index)] if isinstance(value, list) else value[index]
        except IndexError:
            return ""  # such as an empty list of answers
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where} asks for {name}{indices}, but [{index}] does not exist") from error
    if isinstance(value, (list, dict)) or value is None:
        raise DataError(f"{where}'s {name}{indices} is {describe_type(value)}, not text")
    return str(value)


def describe_type(value: Any) -> str:
    """The type of a record's value, for messages."""
    return "nothing (null)" if value is None else type_named(value)
