"""Reads JSON that may have been damaged, or be another's: what is no good is left out, never raised."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_LONGEST = 1 << 20


def parse_object(text: bytes | str, *, longest: float = _LONGEST) -> dict[str, Any] | None:
    """The JSON object that `text` is; None where it is none, or longer than `longest`."""
    if len(text) > longest:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number(value: Any) -> float:
    """`value` as a finite float; NaN where it is anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        converted = float(value)
    except OverflowError:
        return math.nan
    return converted if math.isfinite(converted) else math.nan


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return math.isfinite(number(value))


def text_of(path: Path) -> str:
    """What stands in a file; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
