"""trackio: a local dashboard, or a Hugging Face Space if TRACKIO_SPACE_ID names one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dist_trainer.config.command_line import command_path
from dist_trainer.storage.files import replace_file
from dist_trainer.tracking.run_reader import text_of
from dist_trainer.tracking.sink import LogCursor, LogFn, metrics_of

FOLDER = "trackio"


class TrackioSink:
    """One run in trackio, even across restarts: the run's trackio/ stores its trackio id and the last line sent."""

    def __init__(self, description: dict[str, Any], log: LogFn) -> None:
        """Open the earlier run, or a new one, which then gets all lines. Raises whatever trackio raises."""
        self._folder = Path(description["folder"])
        self._project = description["project"]
        (self._folder / FOLDER).mkdir(exist_ok=True)
        saved_id = text_of(self._folder / FOLDER / "run_id").strip()
        self._run = self._open(description, resume="allow" if saved_id else "never")
        if saved_id and self._run.id != saved_id:
            # trackio finds runs by name only, and returns the latest.
            log(f"trackio now has another run named {self._run.name}, or has lost this one; sending all of this one again")
            self._run.finish()
            self._run = self._open(description, resume="never")
        is_new = self._run.id != saved_id
        self._cursor = LogCursor.read(self._folder, FOLDER) if not is_new else LogCursor()
        if is_new:
            replace_file(self._folder / FOLDER / "run_id", [self._run.id.encode() + b"\n"], durable=True)

    def take(self, line: dict[str, Any]) -> None:
        """Log its numbers; a sample also as text."""
        if self._cursor.has_passed(line):
            return
        self._cursor.advance(line, self._folder, FOLDER)
        row = metrics_of(line)
        if line["kind"] == "sample":
            row["sample"] = _markdown(line)
        self._run.log(row, step=line["step"])

    def finish(self, state: str) -> None:
        """Wait until everything is written."""
        self._run.finish()

    def summary(self) -> str:
        """The command that shows it."""
        return f"view it with `{command_path('trackio')} show --project {shlex.quote(self._project)}`"

    @staticmethod
    def _open(description: dict[str, Any], *, resume: str) -> Any:
        import trackio

        return trackio.init(
            project=description["project"],
            name=description["name"],
            group=description["group"],
            config=description["config"],
            resume=resume,
            embed=False,
            auto_log_cpu=False,
        )


def _markdown(line: dict[str, Any]) -> Any:
    import trackio

    return trackio.Markdown(f"**{line.get('prompt')}** {line.get('text')}")
