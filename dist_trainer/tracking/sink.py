"""What W&B, TensorBoard and trackio share: an interface, the names of metrics, and a record of the last line sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dist_trainer.storage.files import replace_file
from dist_trainer.tracking.run_reader import parse_object, text_of

NOT_METRICS = {"kind", "step", "time", "non_finite", "prompt", "text"}
NOT_SENT = {"digest"}
"""Kinds of lines without numbers, which a sink is not given. They come late, and some sinks cannot go back a step."""

SECONDS_ALONE = 60.0
"""How long an export process may continue after training was killed and nothing waits for it."""

CURSOR_FILE = "cursor.json"
"""File in the sink's subfolder of the run's folder."""
OLD_CURSOR_FILE = "logged.json"
"""Its name in runs from before it was renamed."""

LogFn = Callable[..., None]
"""Writes to the trainer's log, given a text and its level (default: INFO)."""


class Sink(Protocol):
    """Sends one run to one other tool."""

    def take(self, line: dict[str, Any]) -> None:
        """Take a line of metrics.jsonl. At each start of the run all lines are given again, from the first one: the sink must
        make sure that no step appears twice.
        """

    def finish(self, state: str) -> None:
        """The run ended: finished, preempted, failed, or killed."""

    def summary(self) -> str:
        """For the log, after `finish`: where the run can be seen."""


@dataclass
class LogCursor:
    """The last line that a sink was given, kept in the run's folder, for sinks that cannot go back a step."""

    step: int = -1
    kinds: list[str] = field(default_factory=list)
    """Kinds of the lines of that step."""
    is_synced: bool = False
    """Whether everything is known to have arrived; stays False if the sink never reports it."""

    @staticmethod
    def read(folder: Path, sink: str) -> LogCursor:
        """The cursor of `sink` in the run in `folder`; before the first line if there is none."""
        for name in (CURSOR_FILE, OLD_CURSOR_FILE):
            saved = parse_object(text_of(folder / sink / name)) or {}
            step, kinds = saved.get("step"), saved.get("kinds")
            if type(step) is int and isinstance(kinds, list):
                return LogCursor(step, kinds, saved.get("is_synced", saved.get("has_arrived")) is True)
        return LogCursor()

    def has_passed(self, line: dict[str, Any]) -> bool:
        """Whether `line` has been logged, since this start of the run or an earlier one."""
        return line["step"] < self.step or (line["step"] == self.step and line["kind"] in self.kinds)

    def advance(self, line: dict[str, Any], folder: Path, sink: str) -> None:
        """Record `line` as logged. Called before logging it: losing a line to a kill is better than logging a step twice."""
        if line["step"] != self.step:
            self.step, self.kinds = line["step"], []
        self.kinds.append(line["kind"])
        self.is_synced = False
        self._write(folder, sink)

    def mark_synced(self, folder: Path, sink: str) -> None:
        """Record that everything has arrived."""
        self.is_synced = True
        self._write(folder, sink)

    def _write(self, folder: Path, sink: str) -> None:
        text = json.dumps({"step": self.step, "kinds": self.kinds, "is_synced": self.is_synced})
        replace_file(folder / sink / CURSOR_FILE, [text.encode()], durable=False)


def metrics_of(line: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a line, named `train/loss` and so on; unknown values (null) are left out."""
    non_finite = line.get("non_finite")
    values = {**line, **(non_finite if isinstance(non_finite, dict) else {})}
    return {
        f"{line['kind']}/{name}": _as_number(value)
        for name, value in values.items()
        if name not in NOT_METRICS and value is not None
    }


def _as_number(value: Any) -> Any:
    """Booleans as 0 and 1, "nan", "inf" and "-inf" as these floats; everything else unchanged."""
    if isinstance(value, bool):
        return int(value)
    return float(value) if value in ("nan", "inf", "-inf") else value
