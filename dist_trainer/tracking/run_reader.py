"""Reads a run's folder: metrics, events, config, status, progress. Imports no torch.

Tolerant: the files may be damaged or not ours. Anything invalid (incomplete lines, unknown lines, values that are not numbers)
is skipped and never raises.
"""

from __future__ import annotations

import functools
import json
import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_trainer.config.paths import CHECKPOINTS, RUN_CONFIG, STATUS_FILE
from dist_trainer.config.yaml_files import load_yaml
from dist_trainer.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "logs/events.jsonl"
PROGRESS_FILE = "logs/progress"
CERTIFICATE_FILE = "certificate.json"
"""What `verify` found."""
OLD_PROGRESS_FILE = "logs/steps_done"
"""Its name in runs from before it was renamed."""
DIGITS_OF_A_STEP = 15

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

_MAX_STEP = 10**DIGITS_OF_A_STEP
_MAX_EVENTS = 10_000
_MAX_LINE_LENGTH = 1 << 20
_MAX_CERTIFICATE_LENGTH = 1 << 24


@dataclass(frozen=True)
class SampleText:
    """A sample of text after `step` steps."""

    step: int
    prompt: str
    text: str
    seconds: float = math.nan
    """How long sampling took."""


@dataclass
class RunHistory:
    """The contents of a run's files; `refresh` reads what has been added since the last call."""

    folder: Path
    train: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in TRAIN_COLUMNS})
    """Columns of the training lines; NaN if a line lacks the number."""
    validation: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in VALIDATION_COLUMNS})
    skipped: list[int] = field(default_factory=list)
    """Logged steps whose update was skipped (NaN/Inf)."""
    samples: list[SampleText] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    """Each with `event` (text), `step` (int) and `time` (unix seconds or NaN)."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved config, nested; empty if it cannot be read."""
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    """Metadata of the latest start."""
    parameters: float = math.nan
    """Number of trainable parameters, from the latest start."""
    certificate: dict[str, Any] = field(default_factory=dict)
    """Certificate of the latest `verify`; empty if there is none, or it cannot be read."""
    _read_bytes: int = 0

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.folder.name or str(self.folder)

    def refresh(self) -> None:
        """Read the lines appended since the last call, and all of the small files."""
        for line, end in complete_lines(self.folder / METRICS_FILE, start=self._read_bytes):
            self._read_bytes = end
            self._add_line(line)
        self.events = list(read_events(self.folder))
        self.config = self.config or _config_from(text_of(self.folder / RUN_CONFIG))
        self.status = read_status(self.folder)
        self.certificate = parse_object(text_of(self.folder / CERTIFICATE_FILE), max_length=_MAX_CERTIFICATE_LENGTH) or {}
        environments = [e["environment"] for e in self.events if isinstance(e.get("environment"), dict)]
        self.environment = environments[-1] if environments else {}
        counts = [number(event["parameters"]) for event in self.events if "parameters" in event]
        self.parameters = counts[-1] if counts else math.nan

    def _add_line(self, text: bytes) -> None:
        line = parse_object(text)
        step = number(line.get("step")) if line else math.nan
        if line is None or not 0 <= step <= _MAX_STEP:
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
    """The history of the run in `folder` up to now."""
    history = RunHistory(folder)
    history.refresh()
    return history


def has_history(folder: Path) -> bool:
    """Whether `folder` contains metrics or events of a run."""
    return any((folder / name).is_file() for name in (METRICS_FILE, EVENTS_FILE))


def run_folder_of(path: Path, *, is_run: Callable[[Path], bool] = has_history) -> Path | None:
    """`path` if it is a run's folder, or the run that the checkpoint `path` belongs to; None if it is neither."""
    if is_run(path):
        return path
    inside = path.resolve()
    runs = (folder for folder in inside.parents[:2] if inside.is_relative_to(folder / CHECKPOINTS))
    return next((folder for folder in runs if is_run(folder)), None)


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """The run's events, oldest first."""
    for index, (text, _) in enumerate(complete_lines(folder / EVENTS_FILE)):
        event = parse_object(text)
        if event is None or not isinstance(event.get("event"), str) or index >= _MAX_EVENTS:
            continue
        step = number(event.get("step"))
        if 0 <= step <= _MAX_STEP:
            yield {**event, "step": int(step), "time": number(event.get("time"))}


def read_status(folder: Path) -> dict[str, Any]:
    """status.json of the run in `folder`; empty if it cannot be read."""
    return parse_object(text_of(folder / STATUS_FILE)) or {}


def was_validated(folder: Path) -> bool:
    """Whether metrics.jsonl of the run in `folder` contains a validation."""
    return any(
        b'"validation"' in text and (parse_object(text) or {}).get("kind") == "validation"
        for text, _ in complete_lines(folder / METRICS_FILE)
    )


def last_logged_step(folder: Path) -> int:
    """The largest step in metrics.jsonl of the run in `folder`; 0 if there is none."""
    steps = (number((parse_object(text) or {}).get("step")) for text, _ in complete_lines(folder / METRICS_FILE))
    return int(max((step for step in steps if 0 <= step <= _MAX_STEP), default=0))


def read_progress(folder: Path) -> int:
    """The last step recorded in logs/progress of the run in `folder`; 0 if there is none."""
    digits = (text_of(folder / PROGRESS_FILE) or text_of(folder / OLD_PROGRESS_FILE)).strip()
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= DIGITS_OF_A_STEP else 0


def complete_lines(path: Path, *, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """Each line that ends in a newline, from byte `start` on, with the position after it; stops if `path` cannot be read."""
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


def parse_object(text: bytes | str, *, max_length: float = _MAX_LINE_LENGTH) -> dict[str, Any] | None:
    """The JSON object in `text`; None if it is not one, or longer than `max_length`."""
    if len(text) > max_length:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, however long its sample is; None if it is not one."""
    line = parse_object(text, max_length=math.inf)
    if line is None or not isinstance(line.get("kind"), str) or type(line.get("step")) is not int:
        return None
    return line if line["step"] > 0 else None


def number(value: Any) -> float:
    """`value` as a finite float; NaN if it is anything else."""
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
    """The contents of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@functools.lru_cache(maxsize=4)  # a run reads its own config several times, and parsing YAML takes 50 ms
def _config_from(text: str) -> dict[str, Any]:
    try:
        config = load_yaml(text, RUN_CONFIG)
    except ConfigError:
        return {}
    return config if isinstance(config, dict) else {}
