"""The text of a record: one column, or a template of several, such as "{context}\\n{answers[text][0]}"."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from dist_trainer.config.schema import DataConfig
from dist_trainer.config.template import parse_template
from dist_trainer.data.marked_text import MarkedText
from dist_trainer.data.text_file import LongText
from dist_trainer.errors import DataError

TOOLS = "tools"
"""A column that describes tools to a conversation."""
PROMPT_COLUMNS = ("instruction", "input", "prompt", "question", "query", "context")
COMPLETION_COLUMNS = ("output", "completion", "response", "answer")
TextOf = Callable[[str, dict[str, Any]], str | LongText | MarkedText]
"""(place, record) to text; raises DataError naming the place."""


def text_of(column: str, template: str | None) -> TextOf:
    """How a record becomes text, by data.text_column or data.template."""
    return _column(column) if template is None else _template(template)


def completion_of(template: str) -> Callable[[str, dict[str, Any]], str]:
    """How a record becomes what follows its prompt, by data.completion_template."""
    return _template(template, key="data.completion_template")


def columns_of(config: DataConfig) -> list[str]:
    """The columns of a record that `config` reads."""
    if config.messages_column is not None:
        return [config.messages_column]
    templates = [template for template in (config.template, config.completion_template) if template is not None]
    columns = {name for template in templates for name, _ in parse_template(template) if name is not None}
    if config.template is None:
        columns.add(config.text_column)
    return sorted(columns)


def optional_columns_of(config: DataConfig) -> list[str]:
    """The columns that `config` reads if they are there."""
    return [TOOLS] if config.messages_column is not None else []


def missing_column(column: str, present: list[str], where: str) -> DataError:
    """The message for a column that is not there."""
    return DataError(
        f"{where}: there is no column {column!r}, only {', '.join(map(repr, present)) or 'none'}; {_how_to_read(present)}"
    )


def _how_to_read(columns: list[str]) -> str:
    """The keys to set: those for prompts and completions, if the columns have the names that such columns often have."""
    prompts = [name for name in columns if name in PROMPT_COLUMNS]
    completion = next((name for name in columns if name in COMPLETION_COLUMNS), None)
    if prompts and completion is not None:
        prompt = "\\n".join(f"{{{name}}}" for name in prompts)
        return f'set --data.template "{prompt}\\n" and --data.completion_template "{{{completion}}}" to train on {completion!r}'
    return (
        "set --data.text_column, --data.template for text of several columns, or --data.messages_column for conversations "
        "(null: for none)"
    )


def _column(column: str) -> TextOf:
    def read(where: str, record: dict[str, Any]) -> str | LongText:
        if column not in record:
            raise missing_column(column, list(record), where)
        value = record[column]
        if not isinstance(value, str | LongText):
            remedy = "; a list of messages is read by --data.messages_column" if isinstance(value, list) else ""
            raise DataError(f"{where}: the column {column!r} holds {kind_of(value)}, not text{remedy}")
        return value

    return read


def _template(template: str, *, key: str = "data.template") -> Callable[[str, dict[str, Any]], str]:
    parts = parse_template(template, key=key)

    def fill(where: str, record: dict[str, Any]) -> str:
        return "".join(
            literal if name is None else _look_up(record, name, literal, f"{where}: {key}") for name, literal in parts
        )

    return fill


def _look_up(record: dict[str, Any], name: str, indices: str, where: str) -> str:
    """`where` names the place and the key of the template."""
    if name not in record:
        raise missing_column(name, list(record), where)
    value = record[name]
    for index in re.findall(r"\[([^\[\]]+)\]", indices):
        try:
            value = value[int(index)] if isinstance(value, list) else value[index]
        except IndexError:
            return ""  # an empty list of answers, say: the slot stays empty
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where} asks for {name}{indices}, but [{index}] is not there") from error
    if isinstance(value, (list, dict)) or value is None:
        raise DataError(f"{where}'s {name}{indices} is {kind_of(value)}, not text")
    return str(value)


def kind_of(value: Any) -> str:
    """What a value of a record is, in words."""
    return "nothing (null)" if value is None else f"a {type(value).__name__}"
