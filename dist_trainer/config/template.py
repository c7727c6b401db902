"""What data.template and data.completion_template may say; filling them in is data/templates.py's."""

from __future__ import annotations

import re
import string

from dist_trainer.errors import ConfigError

ALPACA = "alpaca"
"""data.template for records with Alpaca's columns."""
_FIELD = re.compile(r"([^\[\].{}!:]+)((?:\[[^\[\]{}]+\])*)")


def parse_template(template: str, *, key: str = "data.template") -> list[tuple[str | None, str]]:
    """(None, literal text) and (column, its indices) in order. Only look-ups: no attributes, calls or format codes.

    Raises ConfigError that names `key`, with the remedy.
    """
    parts: list[tuple[str | None, str]] = []
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{key}: {template!r} is not a template ({error}); write {{{{ for a brace") from error
    for literal, name, code, conversion in pieces:
        if literal:
            parts.append((None, literal))
        if name is None:
            continue
        match = _FIELD.fullmatch(name)
        if match is None or code or conversion:
            raise ConfigError(f"{key}: {{{name}}} is not a column, optionally with [key] or [index] behind it")
        parts.append((match[1], match[2]))
    if all(name is None for name, _ in parts):
        raise ConfigError(f"{key}: {template!r} names no column; write them as {{column}}")
    return parts
