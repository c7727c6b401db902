"""Counts in words."""

from __future__ import annotations


def counted(number: int, thing: str, ending: str = "s") -> str:
    """`1 row`, `2 rows`, `0 batches`."""
    return f"{number} {thing}{'' if number == 1 else ending}"
