"""report.html: one or several runs on one page that needs no network, also on phones, in dark mode, by keyboard, on paper."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_trainer.config.secrets import masked, masked_within
from dist_trainer.html_report.charts import SMOOTHING, axes_of, charts, figure, script_data
from dist_trainer.html_report.sections import (
    config,
    differences,
    environment,
    folded,
    heading,
    samples,
    stops_and_restarts,
    time_spent,
)
from dist_trainer.storage.files import replace_file
from dist_trainer.tracking.goodput import goodput
from dist_trainer.tracking.run_reader import RunHistory

REPORT_FILE = "report.html"
SHARE_OF_TIME = 0.01
"""Maximum fraction of a run's time spent on pages written during training."""
STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("script.js").read_text(encoding="utf-8")

CONTROLS = """<noscript><p class="note">The charts need JavaScript; metrics.jsonl has their numbers.</p></noscript>
<form class="controls" hidden><fieldset><legend>x-axis</legend>
<label><input type="radio" name="axis" value="step" checked> steps</label>
<label><input type="radio" name="axis" value="tokens"> tokens</label>
<label><input type="radio" name="axis" value="hours"> time since the start</label></fieldset>
<label class="range"><input type="checkbox" name="range"> full y-range</label></form>"""


def html_report(runs: Sequence[RunHistory]) -> str:
    """The page, with several runs over one another in its charts; secrets are masked."""
    runs = [without_secrets(run) for run in runs]
    labels, spent = labels_of(runs), [goodput(run) for run in runs]
    loss, *others = (figure(chart) for chart in charts(runs, labels))
    small = "".join(others)
    smoothing = folded("how curves are smoothed", f"<p>{SMOOTHING}</p>")

    def title(text: str, number: int) -> str:
        return text if len(runs) == 1 else f"{text} of {labels[number]}"

    body = "".join(
        [
            heading(runs, labels, spent),
            differences(runs, labels),
            CONTROLS if loss or small else '<p class="faded">No step has been logged yet.</p>',
            f'<div class="wide">{loss}{smoothing}</div>' if loss else "",
            stops_and_restarts(runs, labels),
            f'<div class="charts">{small}</div>' if small else "",
            time_spent(spent, labels),
            *(samples(run, title("Samples", number)) for number, run in enumerate(runs)),
            *(config(run, title("Config", number)) for number, run in enumerate(runs)),
            *(environment(run, title("Environment", number)) for number, run in enumerate(runs)),
        ]
    )
    axes = script_data([axes_of(run) for run in runs])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(", ".join(labels))}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><main>{body}</main>"
        f'<script type="application/json" id="axes">{axes}</script><script>{SCRIPT}</script></body></html>\n'
    )


def without_secrets(run: RunHistory) -> RunHistory:
    """A copy of `run` with its texts masked, sharing its arrays of numbers."""
    samples = [replace(sample, prompt=masked(sample.prompt), text=masked(sample.text)) for sample in run.samples]
    texts = {name: masked_within(getattr(run, name)) for name in ("events", "config", "status", "environment", "certificate")}
    return replace(run, samples=samples, **texts)


def labels_of(runs: Sequence[RunHistory]) -> list[str]:
    """The runs' names; runs with the same name get as much of their paths as is needed to tell them apart."""
    paths = [run.folder.absolute() for run in runs]
    labels = [run.name for run in runs]
    for parts in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        duplicates = {label for label in labels if labels.count(label) > 1}
        if not duplicates:
            break
        labels = [
            "/".join(path.parts[-parts:]) if label in duplicates else label for label, path in zip(labels, paths, strict=True)
        ]
    return masked_within(labels)


def write_report(history: RunHistory) -> None:
    """Read new lines of `history`'s run and write the page into its folder. Raises OSError if that fails."""
    history.refresh()
    replace_file(history.folder / REPORT_FILE, [html_report([history]).encode()], durable=False)


class ReportTracker:
    """Keeps report.html up to date: at validations and samples, within a share of the run's time, and at the end."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._history = RunHistory(folder)
        self._clock = clock
        self._not_before = -math.inf

    def log(self, line: dict[str, Any]) -> None:
        """Write the page after a validation or a sample; the longer that took, the longer until the next one."""
        if line.get("kind") in ("validation", "sample") and self._clock() >= self._not_before:
            began = self._clock()
            write_report(self._history)
            self._not_before = self._clock() + (self._clock() - began) / SHARE_OF_TIME

    def close(self, *, state: str, reason: str | None) -> None:
        """Write the last page."""
        write_report(self._history)
