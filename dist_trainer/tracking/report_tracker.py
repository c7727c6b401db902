"""Keeps report.html up to date: at each validation and at the end."""

from __future__ import annotations

from typing import Any

from dist_trainer.tracking.atomic_file import replace_file
from dist_trainer.tracking.report.page import html_report
from dist_trainer.tracking.run_context import RunContext
from dist_trainer.tracking.run_history import RunHistory

REPORT_FILE = "report.html"


class ReportTracker:
    """Reads only what metrics.jsonl has gained since the last page."""

    def __init__(self, context: RunContext) -> None:
        self._history = RunHistory(context.folder)

    def log(self, line: dict[str, Any]) -> None:
        """Make the page anew after a validation, and after the sample that follows it."""
        if line.get("kind") in ("validation", "sample"):
            self._write()

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
