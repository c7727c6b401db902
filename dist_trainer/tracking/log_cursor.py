"""How far a sink that cannot take a step back has come in metrics.jsonl: kept, so that no step is logged there twice."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_trainer.storage.atomic_file import replace_file

POSITION_FILE = "logged.json"
"""In the sink's own folder inside the run's."""


@dataclass
class LogCursor:
    """The last step that was logged, and the kinds of lines that were logged of it."""

    step: int = -1
    kinds: list[str] = field(default_factory=list)
    has_arrived: bool = False
    """Whether all of it is known to be where it was to go. Of a sink that never says so, nothing follows from it."""

    @staticmethod
    def read(folder: Path, sink: str) -> LogCursor:
        """That of `sink` in the run in `folder`; the beginning where there is none."""
        try:
            kept = json.loads((folder / sink / POSITION_FILE).read_text(encoding="utf-8"))
            return LogCursor(int(kept["step"]), [str(kind) for kind in kept["kinds"]], kept.get("has_arrived") is True)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return LogCursor()

    def passes(self, line: dict[str, Any]) -> bool:
        """Whether `line` has been logged, in this life of the run or in an earlier one."""
        return line["step"] < self.step or (line["step"] == self.step and line["kind"] in self.kinds)

    def advance(self, line: dict[str, Any], folder: Path, sink: str) -> None:
        """Note `line` as logged. Called before it is: a line lost to a kill is better than a step that stands twice."""
        if line["step"] != self.step:
            self.step, self.kinds = line["step"], []
        self.kinds.append(line["kind"])
        self.has_arrived = False
        self._write(folder, sink)

    def mark_synced(self, folder: Path, sink: str) -> None:
        """Note that all that was logged has come to where it was to go."""
        self.has_arrived = True
        self._write(folder, sink)

    def _write(self, folder: Path, sink: str) -> None:
        text = json.dumps({"step": self.step, "kinds": self.kinds, "has_arrived": self.has_arrived})
        replace_file(folder / sink / POSITION_FILE, [text.encode()], durable=False)
