"""What a run's folder tells: lines, events, config, status. Reads what is there and good, and imports no torch.

Whatever else may stand in the files (half lines, other people's lines, numbers that are none) is skipped, never raised.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_trainer.config.yaml_files import load_yaml
from dist_trainer.errors import ConfigError
from dist_trainer.tracking.events import EVENTS_FILE
from dist_trainer.tracking.lenient_json import number, parse_object, text_of
from dist_trainer.tracking.run_context import METRICS_FILE
from dist_trainer.tracking.status import read_status

TRAIN_COLUMNS = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "mfu",
    "step_seconds",
    "data_seconds",
    "checkpoint_stall_ms",
    "peak_memory_bytes",
    "time",
)
VALIDATION_COLUMNS = ("step", "loss", "perplexity", "bits_per_byte", "seconds", "time")

_MOST_STEPS = 1e15
_MOST_EVENTS = 10_000


@dataclass(frozen=True)
class SampleText:
    """What the model wrote after `step` steps."""

    step: int
    prompt: str
    text: str
    seconds: float = math.nan
    """It took so long."""


@dataclass
class RunHistory:
    """A run, as far as its files tell; `refresh` reads what was added since."""

    folder: Path
    train: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in TRAIN_COLUMNS})
    """Columns of the training lines; NaN where a line has no number."""
    validation: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in VALIDATION_COLUMNS})
    skipped: list[int] = field(default_factory=list)
    """Logged steps whose update was skipped as non-finite."""
    samples: list[SampleText] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    """Each with `event` (text), `step` (int) and `time` (unix seconds or NaN)."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved config, nested; empty where it cannot be read."""
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    """Of the latest start."""
    parameters: float = math.nan
    """Trainable numbers in the model, as the latest start has them."""
    _read_bytes: int = 0

    @property
    def name(self) -> str:
        """The run's name, as its folder has it."""
        return self.folder.name or str(self.folder)

    def refresh(self) -> None:
        """Read the lines appended since the last call, and the small files anew."""
        for line, end in whole_lines(self.folder / METRICS_FILE, start=self._read_bytes):
            self._read_bytes = end
            self._take(line)
        self.events = list(read_events(self.folder))
        self.config = self.config or _read_config(self.folder / "config.yaml")
        self.status = read_status(self.folder)
        environments = [e["environment"] for e in self.events if isinstance(e.get("environment"), dict)]
        self.environment = environments[-1] if environments else {}
        counts = [number(event["parameters"]) for event in self.events if "parameters" in event]
        self.parameters = counts[-1] if counts else math.nan

    def _take(self, text: bytes) -> None:
        line = parse_object(text)
        step = number(line.get("step")) if line else math.nan
        if line is None or not 0 <= step <= _MOST_STEPS:
            return
        kind = line.get("kind")
        if kind == "train":
            for name, column in self.train.items():
                value = line.get(name)
                column.append(value if type(value) is float and value - value == 0 else number(value))
            if line.get("skipped") is True:
                self.skipped.append(int(step))
        elif kind == "validation":
            for name, column in self.validation.items():
                column.append(number(line.get(name)))
        elif kind == "sample":
            prompt, written = str(line.get("prompt", "")), str(line.get("text", ""))
            self.samples.append(SampleText(int(step), prompt, written, number(line.get("seconds"))))


def read_run(folder: Path) -> RunHistory:
    """Everything that `folder` tells by now."""
    history = RunHistory(folder)
    history.refresh()
    return history


def is_run_folder(folder: Path) -> bool:
    """Whether a run has left something to read in `folder`."""
    return any((folder / name).is_file() for name in (METRICS_FILE, EVENTS_FILE))


def run_folder_of(path: Path, *, is_run: Callable[[Path], bool] = is_run_folder) -> Path | None:
    """The run that `path` means: itself, or the one that the checkpoint `path` belongs to; None where there is none."""
    if is_run(path):
        return path
    inside = path.resolve()
    runs = (folder for folder in inside.parents[:2] if inside.is_relative_to(folder / "checkpoints"))
    return next((folder for folder in runs if is_run(folder)), None)


def whole_lines(path: Path, *, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """Each line of `path` that has its end, from byte `start` on, with the position after it, as far as it can be read."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file, suppress(OSError):
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield line, start


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """The run's events, oldest first."""
    for index, (text, _) in enumerate(whole_lines(folder / EVENTS_FILE)):
        event = parse_object(text)
        if event is None or not isinstance(event.get("event"), str) or index >= _MOST_EVENTS:
            continue
        step = number(event.get("step"))
        if 0 <= step <= _MOST_STEPS:
            yield {**event, "step": int(step), "time": number(event.get("time"))}


def was_validated(folder: Path) -> bool:
    """Whether the run in `folder` was validated so far."""
    return any(
        b'"validation"' in text and (parse_object(text) or {}).get("kind") == "validation"
        for text, _ in whole_lines(folder / METRICS_FILE)
    )


def last_step(folder: Path) -> int:
    """The largest step that a line of the run in `folder` has; 0 where there is none."""
    steps = (number((parse_object(text) or {}).get("step")) for text, _ in whole_lines(folder / METRICS_FILE))
    return int(max((step for step in steps if 0 <= step <= _MOST_STEPS), default=0))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = load_yaml(text_of(path), str(path))
    except ConfigError:
        return {}
    return config if isinstance(config, dict) else {}
