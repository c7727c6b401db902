"""The text of a record: one column, or a template of several, such as "{context}\\n{answers[text][0]}"."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from dist_trainer.config.template import parse_template
from dist_trainer.data.text_file import LongText
from dist_trainer.errors import DataError

TextOf = Callable[[str, dict[str, Any]], str | LongText]
"""(place, record) to text; raises DataError naming the place."""


def text_of(column: str, template: str | None) -> TextOf:
    """How a record becomes text, by data.text_column or data.template."""
    return _column(column) if template is None else _template(template)


def columns_of(column: str, template: str | None) -> list[str]:
    """The columns that `text_of` reads."""
    return [column] if template is None else sorted({name for name, _ in parse_template(template) if name is not None})


def missing_column(column: str, present: list[str], where: str) -> DataError:
    """The message for a column that is not there."""
    return DataError(
        f"{where}: there is no column {column!r}, only {', '.join(map(repr, present)) or 'none'}; "
        "set --data.text_column, or --data.template for text of several columns"
    )


def _column(column: str) -> TextOf:
    def read(where: str, record: dict[str, Any]) -> str | LongText:
        if column not in record:
            raise missing_column(column, list(record), where)
        value = record[column]
        if not isinstance(value, str | LongText):
            raise DataError(f"{where}: the column {column!r} holds {_kind(value)}, not text")
        return value

    return read


def _template(template: str) -> TextOf:
    parts = parse_template(template)

    def fill(where: str, record: dict[str, Any]) -> str:
        return "".join(literal if name is None else _look_up(record, name, literal, where) for name, literal in parts)

    return fill


def _look_up(record: dict[str, Any], name: str, indices: str, where: str) -> str:
    if name not in record:
        raise missing_column(name, list(record), where)
    value = record[name]
    for index in re.findall(r"\[([^\[\]]+)\]", indices):
        try:
            value = value[int(index)] if isinstance(value, list) else value[index]
        except IndexError:
            return ""  # an empty list of answers, say: the slot stays empty
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: data.template asks for {name}{indices}, but [{index}] is not there") from error
    if isinstance(value, (list, dict)) or value is None:
        raise DataError(f"{where}: data.template's {name}{indices} is {_kind(value)}, not text")
    return str(value)


def _kind(value: Any) -> str:
    return "nothing (null)" if value is None else f"a {type(value).__name__}"
