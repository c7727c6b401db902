"""W&B, TensorBoard and trackio, each in its own process that follows metrics.jsonl, so that nothing in it can delay or
end training.

A thread would not do: W&B hooks into its process (exception hook, exit hooks that wait for its server), and all three hold the
GIL while they import (seconds) and while they write. The export process shares only a pipe with training. It reads the lines
from metrics.jsonl, so there is no queue to overflow, and lines it missed are sent later.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_trainer.config.command_line import command_path
from dist_trainer.config.schema import TrackingConfig
from dist_trainer.config.secrets import masked, masked_within
from dist_trainer.errors import ConfigError
from dist_trainer.tracking.sink import LogCursor

log = logging.getLogger(__name__)

EXPORT_PROCESS = "dist_trainer.tracking.export_process"
SHOWN_BY_WANDB = ("WANDB_NAME", "WANDB_NOTES", "WANDB_TAGS", "WANDB_JOB_TYPE", "WANDB_RUN_GROUP", "WANDB_ENTITY")
"""Environment variables that W&B reads and shows."""
SECONDS_TO_FINISH = 20.0
SECONDS_TO_STOP = 6.0
"""How long to wait if a signal or an error ended the run: the launcher is waiting for all processes to exit."""
SECONDS_TO_DIE = 5.0
"""How long to wait after SIGKILL."""


@dataclass(frozen=True)
class ExportEntry:
    """What differs between the tools on the trainer's side."""

    label: str
    is_enabled: Callable[[TrackingConfig], bool]
    """Whether the config (or WANDB_MODE) enables it."""
    details: Callable[[TrackingConfig], str]
    """Follows the label in the run's header."""
    must_be_installed: bool = True
    """Whether a missing package is an error if the tool is enabled; otherwise it is a warning."""


def _wandb_mode(tracking: TrackingConfig) -> str:
    mode = os.environ.get("WANDB_MODE")
    return mode if mode in ("online", "offline", "disabled") else tracking.wandb


def _project(tracking: TrackingConfig) -> str:
    return tracking.wandb_project or os.environ.get("WANDB_PROJECT") or "dist_trainer"


EXPORTS = {
    "wandb": ExportEntry(
        "W&B",
        is_enabled=lambda tracking: _wandb_mode(tracking) != "disabled",
        details=lambda tracking: f" {_wandb_mode(tracking)} (project {_project(tracking)})",
        must_be_installed=False,
    ),
    "tensorboard": ExportEntry("TensorBoard", is_enabled=lambda tracking: tracking.tensorboard, details=lambda _: ""),
    "trackio": ExportEntry(
        "trackio",
        is_enabled=lambda tracking: tracking.trackio,
        details=lambda tracking: f" (project {_project(tracking)})",
    ),
}
"""Entries of TRACKERS. The package, the config key and the entry in SINKS have the same name."""


def check_packages(tracking: TrackingConfig) -> None:
    """Raises ConfigError if an enabled entry needs an optional package that is not installed."""
    for name, entry in EXPORTS.items():
        if entry.must_be_installed and entry.is_enabled(tracking) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name}: true needs the package {name}, which is not installed; "
                f"install it (`{command_path()} -m pip install {name}`), or set it to false"
            )


def format_exports(tracking: TrackingConfig) -> str:
    """The enabled entries: `W&B offline (project dist_trainer), TensorBoard`."""
    enabled = [f"{entry.label}{entry.details(tracking)}" for entry in EXPORTS.values() if entry.is_enabled(tracking)]
    return ", ".join(enabled) or "no W&B"


def describe_run(name: str, folder: Path, tracking: TrackingConfig, *, run_name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The first message to the export process of the entry `name`; `config` is what it shows as the run's config."""
    shown = {
        "project": _project(tracking),
        "entity": tracking.wandb_entity,
        "group": tracking.wandb_group or os.environ.get("WANDB_RUN_GROUP"),
        "tags": [tag.strip() for tag in (tracking.wandb_tags or "").split(",") if tag.strip()] or None,
        "name": run_name,
        "config": config,
    }
    return {
        "sink": name,
        "label": EXPORTS[name].label,
        "folder": str(folder.resolve()),
        "mode": _wandb_mode(tracking),
        "code": str(Path(__file__).parents[1]) if tracking.wandb_code else None,
        "trainer_pid": os.getpid(),
        **masked_within(shown),
    }


class SubprocessTracker:
    """Starts the export process, tells it when metrics.jsonl has grown, and passes its messages on to the log."""

    def __init__(self, description: dict[str, Any]) -> None:
        """Start the process for the run described by `describe_run`; if the package is missing or the process cannot start,
        there is one warning.
        """
        name, self._label = description["sink"], description["label"]
        self._can_catch_up = name == "wandb" and description["mode"] == "online"
        """Whether rerunning the command sends what is missing even after the run has finished."""
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline: float | None = None
        if importlib.util.find_spec(name) is None:
            log.warning("tracking.%s: the package %s is not installed; continuing without %s", name, name, self._label)
            return
        output = f"logs/{name}.log"  # what the package itself prints
        try:
            self._process = _start_process(Path(description["folder"]) / output)
        except OSError as error:
            log.warning(
                "tracking.%s: its process could not be started (%s); continuing without %s", name, error.strerror, self._label
            )
            return
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        self._send(json.dumps(description).encode() + b"\n")
        # From here on a slow process never blocks training: a full pipe is more than enough to wake it up.
        os.set_blocking(self._pipe, False)
        arguments = (self._process, self._label, output)
        self._reader_thread = threading.Thread(target=_log_messages, args=arguments, name=f"{name} messages", daemon=True)
        self._reader_thread.start()

    def log(self, line: dict[str, Any]) -> None:
        """Tell the process that metrics.jsonl has grown."""
        self._send(b"\n")

    def ask_to_finish(self, state: str) -> None:
        """Tell the process how the run ended, without waiting: `close` waits once all processes have been told."""
        if self._process is None or self._process.stdin is None or self._deadline is not None:
            return
        patience = _patience(state)
        self._deadline = time.monotonic() + patience
        # A process that no longer reads must not block this one either. `select` would reject descriptors above 1,023.
        writable = select.poll()
        writable.register(self._pipe, select.POLLOUT)
        writable.poll(1000 * patience)
        self._send(b"\n" + json.dumps({"state": state}).encode() + b"\n")
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self, *, state: str, reason: str | None) -> None:
        """Wait a few seconds for the process to finish, then end it, and log what it left undone."""
        self.ask_to_finish(state)
        process, deadline = self._process, self._deadline
        if process is None or deadline is None:
            return
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(process)
            log.warning(
                "%s did not finish within %.0f s and was ended; metrics.jsonl has everything%s",
                *(self._label, _patience(state)),
                ", and the same command sends the rest" if self._can_catch_up or state != "finished" else "",
            )
        self._reader_thread.join(1.0)
        self._process = None

    def _send(self, message: bytes) -> None:
        if self._process is None or self._process.stdin is None or self._process.stdin.closed:
            return
        # If this fails, the pipe is full, which wakes the process anyway, or it has ended and the reader thread logs why.
        with contextlib.suppress(OSError):
            os.write(self._pipe, message)


def is_wandb_behind(folder: Path, tracking: TrackingConfig) -> bool:
    """Whether W&B is online and its server may lack part of the run in `folder`."""
    return _wandb_mode(tracking) == "online" and not LogCursor.read(folder, "wandb").is_synced


def _patience(state: str) -> float:
    return SECONDS_TO_FINISH if state == "finished" else SECONDS_TO_STOP


def _start_process(output: Path) -> subprocess.Popen[bytes]:
    package_parent = str(Path(__file__).parents[2])
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment |= {name: masked(environment[name]) for name in SHOWN_BY_WANDB if name in environment}
    with output.open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", EXPORT_PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            # Its own session: Ctrl-C and signals to the job's process group do not reach it; it ends when this process does.
            start_new_session=True,
        )


def _log_messages(process: subprocess.Popen[bytes], label: str, output: str) -> None:
    """Log the process's messages, and warn if it ends without a final one."""
    assert process.stdout is not None
    has_ended_well = False
    with process.stdout as messages:
        for text in messages:
            try:
                message = json.loads(text)
                level, words, has_ended_well = int(message["level"]), str(message["text"]), bool(message["last"])
            except (ValueError, KeyError, TypeError):
                continue
            log.log(level, "%s", words)
    code = process.wait()
    if not has_ended_well and code != -signal.SIGKILL:
        log.warning("%s: its process ended unexpectedly (exit code %d, see %s); training continues", label, code, output)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process blocked on a dead disk cannot be killed
        process.wait(SECONDS_TO_DIE)
