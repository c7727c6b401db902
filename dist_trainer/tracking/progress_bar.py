"""The bar on a terminal: as many fields as it has room for, each one whole."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

NARROWEST = 10
"""Characters of the bar itself; where it has less room, a field is left out."""
FIELDS = ("time", "rate", "loss", "learning rate", "throughput")
"""What follows the bar, in this order."""
LEFT_OUT = ("rate", "learning rate", "throughput", "loss", "time")
"""What goes first where there is too little room."""


class ProgressBar(tqdm):
    """tqdm, which alone would shorten the bar to a single character and cut the last field off in the middle of a number."""

    def __init__(self, name: str, *, total: int, initial: int) -> None:
        """A bar on stderr, where that is a terminal."""
        self.shown: dict[str, str] = {}
        """What each field says now; what is missing is left out."""
        width = _width()
        super().__init__(total=total, initial=initial, desc=name, unit="step", file=sys.stderr, disable=None, **width)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm draws, with the fullest format that fits into its columns."""
        metadata: dict[str, Any] = dict(super().format_dict)
        columns = None if self.disable else metadata["ncols"]
        if columns is None:
            return metadata

        def fits(form: str) -> bool:
            trial: dict[str, Any] = {**metadata, "ncols": None, "bar_format": form}
            return len(self.format_meter(**trial)) <= columns

        formats = list(self._formats())
        chosen = next((form for form in formats if fits(form.replace("{bar}", " " * NARROWEST))), formats[-1])
        return {**metadata, "bar_format": chosen}

    def _formats(self) -> Iterator[str]:
        """From the fullest to the shortest, which has no bar."""
        known = {"time": "{elapsed}<{remaining}", "rate": "{rate_fmt}", **self.shown}
        for left_out in range(len(LEFT_OUT) + 1):
            fields = [known[name] for name in FIELDS if name in known and name not in LEFT_OUT[:left_out]]
            behind = f" [{', '.join(fields)}]" if fields else ""
            yield "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}" + behind
        yield "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}"
        yield "{n_fmt}/{total_fmt}"


def _width() -> dict[str, Any]:
    """How wide tqdm is to draw: as the terminal is, also when it changes; one that says 0 columns or rows (a serial
    line, a container without a window) would get no bar at all, so $COLUMNS or 80, $LINES or 24 count there."""
    try:
        known = min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except (OSError, ValueError):  # no terminal: no bar
        known = True
    columns, rows = shutil.get_terminal_size()
    return {"dynamic_ncols": True} if known else {"ncols": columns, "nrows": rows}
