"""TensorBoard: one event file in the run's tensorboard/, rewritten from metrics.jsonl at each start of the run."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import yaml

from dist_trainer.config.command_line import command_path
from dist_trainer.tracking.sink import LogFn, metrics_of

FOLDER = "tensorboard"
_SECONDS_BETWEEN_FLUSHES = 5


class TensorBoardSink:
    """Writes everything again from the first step, so that no step appears twice and none that a restart undid appears at all,
    even in readers that ignore TensorBoard's restart marks. 10,000 lines take about two seconds.
    """

    def __init__(self, description: dict[str, Any], log: LogFn) -> None:
        """Open the file. Raises OSError if it cannot be written, ImportError without the package."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = Path(description["folder"]) / FOLDER
        self._folder.mkdir(exist_ok=True)
        earlier = list(self._folder.glob("events.out.tfevents.*"))
        self._writer = EventFileWriter(str(self._folder), flush_secs=_SECONDS_BETWEEN_FLUSHES)
        for file in earlier:
            file.unlink()
        # Makes a running TensorBoard forget the earlier file.
        self._write(0, time.time(), session_log=SessionLog(status=SessionLog.START))
        self._write_text("config", f"```yaml\n{yaml.safe_dump(description['config'], sort_keys=False)}```", 0, time.time())

    def take(self, line: dict[str, Any]) -> None:
        """Write its numbers as scalars; a sample also as text."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        step, when = line["step"], float(line.get("time") or 0)
        numbers = [(tag, value) for tag, value in metrics_of(line).items() if isinstance(value, int | float)]
        if numbers:
            scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers]
            self._write(step, when, summary=Summary(value=scalars))
        if line["kind"] == "sample":
            self._write_text("sample", f"**{line.get('prompt')}** {line.get('text')}", step, when)

    def finish(self, state: str) -> None:
        """Close the file."""
        self._writer.close()

    def summary(self) -> str:
        """The command that shows it."""
        return f"view it with `{command_path('tensorboard')} --logdir {shlex.quote(str(self._folder.parent.parent))}`"

    def _write_text(self, tag: str, text: str, step: int, when: float) -> None:
        from tensorboard.plugins.text.summary import text_pb

        self._write(step, when, summary=text_pb(tag, text))

    def _write(self, step: int, when: float, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(step=step, wall_time=when, **what))
