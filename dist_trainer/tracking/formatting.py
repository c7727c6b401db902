"""Numbers and text for people: 12.3k, 4.51, 2e-05, 5 min 20 s."""

from __future__ import annotations

import math

_THOUSANDS = ("", "k", "M", "G", "T", "P")


def duration(seconds: float) -> str:
    """The two largest units of a time: `42 s`, `5 min 20 s`, `3 h 5 min`, `2 d 4 h`; `?` if it is unknown."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    if rounded < 86400:
        return f"{rounded // 3600} h {rounded % 3600 // 60} min"
    return f"{rounded // 86400} d {rounded % 86400 // 3600} h"


def quantity(value: float) -> str:
    """Three digits and a decimal prefix: `950`, `12.3k`, `2.41M`; `?` if it is not finite."""
    if not math.isfinite(value):
        return "?"
    power = 0
    while abs(value) >= 999.5 and power < len(_THOUSANDS) - 1:
        value, power = value / 1000, power + 1
    return f"{significant(value, 3)}{_THOUSANDS[power]}"


def memory(num_bytes: float) -> str:
    """Bytes in binary units: `512 MiB`, `71.3 GiB`; `?` if it is not finite."""
    if not math.isfinite(num_bytes):
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1023.5:
            return f"{significant(num_bytes, 3)} {unit}"
        num_bytes /= 1024
    return f"{significant(num_bytes, 3)} TiB"


def significant(value: float, digits: int = 4) -> str:
    """`value` with `digits` significant digits, such as 2e-05 if it is very small or large; `nan` and `inf` by name."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{exponent}"
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def printable(text: str) -> str:
    """`text` with control characters, which a terminal would obey, replaced, except for newlines and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
