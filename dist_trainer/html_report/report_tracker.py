"""Keeps report.html up to date: at validations, at samples, and at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from dist_trainer.html_report.page import html_report
from dist_trainer.storage.atomic_file import replace_file
from dist_trainer.tracking.run_context import RunContext
from dist_trainer.tracking.run_reader import RunHistory

REPORT_FILE = "report.html"
SHARE_OF_TIME = 0.01
"""Of a run's time at most, for pages made while it trains."""


class ReportTracker:
    """Reads only what metrics.jsonl has gained since the last page; holds training up for no more than its share of time."""

    def __init__(self, context: RunContext, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._history = RunHistory(context.folder)
        self._clock = clock
        self._not_before = -math.inf

    def log(self, line: dict[str, Any]) -> None:
        """Make the page anew after a validation or a sample; the longer that took, the longer it is left alone."""
        if line.get("kind") in ("validation", "sample") and self._clock() >= self._not_before:
            began = self._clock()
            self._write()
            self._not_before = self._clock() + (self._clock() - began) / SHARE_OF_TIME

    def sync(self) -> None:
        """Nothing: the page can be made again from metrics.jsonl."""

    def close(self, *, state: str, reason: str | None) -> None:
        """Make the last page."""
        self._write()

    def _write(self) -> None:
        write_report(self._history)


def write_report(history: RunHistory) -> None:
    """Make the page of `history`'s run anew, in its folder. Raises OSError where the disk refuses."""
    history.refresh()
    replace_file(history.folder / REPORT_FILE, [html_report([history]).encode()], durable=False)
