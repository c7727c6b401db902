"""Numbers as people read them: 12.3k, 4.51, 2e-05, 5 min 20 s; and lines of them."""

from __future__ import annotations

import math

_THOUSANDS = ("", "k", "M", "G", "T", "P")


def duration(seconds: float) -> str:
    """The two largest units of a time: `42 s`, `5 min 20 s`, `3 h 5 min`, `2 d 4 h`; `?` where it is unknown."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def quantity(value: float) -> str:
    """Three digits and a decimal prefix: `950`, `12.3k`, `2.41M`; `?` where it is not finite."""
    if not math.isfinite(value):
        return "?"
    power = 0
    while abs(value) >= 999.5 and power < len(_THOUSANDS) - 1:
        value, power = value / 1000, power + 1
    return f"{significant(value, 3)}{_THOUSANDS[power]}"


def short(value: float) -> str:
    """As few digits as tell it, four at most: `1.5k`, `0.003`, `1.25e-5`, `2M`. For axes, which have room for seven characters,
    as `short` in report/script.js; where numbers stand alone, those of `quantity` are steadier.
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def memory(num_bytes: float) -> str:
    """Bytes in binary units: `512 MiB`, `71.3 GiB`; `?` where it is not finite."""
    if not math.isfinite(num_bytes):
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1023.5:
            return f"{significant(num_bytes, 3)} {unit}"
        num_bytes /= 1024
    return f"{significant(num_bytes, 3)} TiB"


def significant(value: float, digits: int = 4) -> str:
    """`value` with so many significant digits, plain where that is short, else as 2e-05; `nan`, `inf` as such."""
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
    """`text` without control characters, which a terminal would obey; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
