"""Counts and types in words, as messages need them."""

from __future__ import annotations


def counted(number: int, thing: str, ending: str = "s") -> str:
    """`1 row`, `2 rows`, `0 batches`."""
    return f"{number} {thing}{'' if number == 1 else ending}"


def type_named(value: object) -> str:
    """The type of `value` with its article: `a list`, `an int`."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"
