"""Values of keys: checks them against the key's type, formats them for messages, and parses those with a special syntax."""

from __future__ import annotations

import math
import re
import string
from decimal import Decimal
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from dist_trainer.config.yaml_files import load_yaml
from dist_trainer.errors import ConfigError

ALPACA = "alpaca"
"""Value of data.template for records with Alpaca's columns."""
MAX_PROFILED_STEPS = 50
"""Each step takes several megabytes of trace, held in memory until the last one."""
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE]\+?\d{1,2})?")
"""Spellings that may be a whole number, such as 1e3 and 2.0. YAML would read 010 as octal."""
_FIELD = re.compile(r"([^\[\].{}!:]+)((?:\[[^\[\]{}]+\])*)")
_STEPS = re.compile(r"\s*([1-9]\d*)\s*(?:-\s*([1-9]\d*)\s*)?", re.ASCII)


def parse_value(value: Any, kind: Any) -> Any:
    """`value`, plain YAML or a command-line argument, converted to type `kind`. Raises ValueError if that is impossible."""
    for option in union_members(kind):
        try:
            return _parse_as(value, option)
        except (ValueError, TypeError, OverflowError, ConfigError):
            continue
    raise ValueError(f"{value!r:.200} is not {format_type(kind)}")


def _parse_as(value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal and isinstance(value, str) and value in get_args(kind):
        return value
    if kind is str and isinstance(value, str):
        return value
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        value = load_yaml(value, "value")
    if kind == tuple[str, ...] and isinstance(value, str):
        return (value,)
    if kind == tuple[str, ...] and isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return tuple(value)
    if get_origin(kind) is tuple and isinstance(value, list | tuple) and len(value) == len(get_args(kind)):
        return tuple(_parse_as(number, inner) for number, inner in zip(value, get_args(kind), strict=True))
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool) and math.isfinite(number := float(value)):
        return number
    if kind is int and not isinstance(value, bool) and _NUMBER.fullmatch(str(value)):
        number = Decimal(str(value))  # exact, and takes 1e3 and 2.0
        if number == number.to_integral_value():
            return int(number)
    raise ValueError


def format_type(kind: Any) -> str:
    """What a value of this type is: `a whole number or null`."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text (put it in quotes)"}
    words = []
    for option in union_members(kind):
        if get_origin(option) is Literal:
            values = ", ".join(map(str, get_args(option)))
            words.append(f"one of {values}" if len(get_args(option)) > 1 else values)
        elif option == tuple[str, ...]:
            words.append("a list of texts, such as [one, two]")
        elif get_origin(option) is tuple:
            words.append(f"a list of {len(get_args(option))} numbers, such as [0.9, 0.95]")
        else:
            words.append(names[option])
    return " or ".join([*words, "null"] if is_nullable(kind) else words)


def as_yaml(value: Any) -> str:
    """A value as in a config file, on one line: null, true, [0.9, 0.95]; text without quotes."""
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]


def format_value(value: Any) -> str:
    """The same with text in quotes, for messages."""
    return repr(value) if isinstance(value, str) else as_yaml(value)


def choices_of(kind: Any) -> list[str]:
    """The values, as typed, of a type that has only a few, such as `true` and `false`."""
    choices: list[str] = []
    for option in union_members(kind):
        choices += map(str, get_args(option)) if get_origin(option) is Literal else ["true", "false"] if option is bool else []
    return choices


def union_members(kind: Any) -> list[Any]:
    """The types of a union, without None; of another type, just itself."""
    is_union = get_origin(kind) is Union or type(kind).__name__ == "UnionType"
    return [option for option in get_args(kind) if option is not type(None)] if is_union else [kind]


def is_nullable(kind: Any) -> bool:
    """Whether a key of this type may be null."""
    return type(None) in get_args(kind)


def unescape(text: str) -> str:
    r"""`text` with `\n`, `\t` and `\\` replaced by a newline, a tab and a backslash."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)


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
            raise ConfigError(f"{key}: {{{name}}} is not a column, optionally followed by [key] or [index]")
        parts.append((match[1], match[2]))
    if all(name is None for name, _ in parts):
        raise ConfigError(f"{key}: {template!r} names no column; write them as {{column}}")
    return parts


def parse_profile_steps(text: str) -> range:
    """The steps, counted from 1, that "5" or "5-8" (inclusive) means. Raises ConfigError with the remedy."""
    match = _STEPS.fullmatch(text)
    if match is None or len(text) > 40:
        raise ConfigError(f"profile.steps: {text!r} is neither a step such as 5 nor a range of steps such as 5-8")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ConfigError(f"profile.steps: {text!r} ends before it starts; write {last}-{first}")
    if last - first >= MAX_PROFILED_STEPS:
        longest = f"{first}-{first + MAX_PROFILED_STEPS - 1}"
        raise ConfigError(f"profile.steps: {text!r} are {last - first + 1} steps, too many for a trace; at most {longest}")
    return range(first, last + 1)
