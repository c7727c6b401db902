"""W&B, TensorBoard and trackio, each from a process of its own that follows metrics.jsonl: nothing it does can hold up or
end training.

Not a thread, because W&B hooks into its process (exception hook, exit hooks that wait for its server), and all of them hold
the interpreter while they import (seconds) and while they write rows. The other process shares nothing with training but a
pipe. It reads the lines from metrics.jsonl, so there is no queue to overflow, and what it missed is sent later.
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

from dist_trainer.config.cli import in_this_shell
from dist_trainer.config.loading import as_dict
from dist_trainer.config.schema import TrackingConfig
from dist_trainer.config.secrets import masked, masked_within
from dist_trainer.errors import ConfigError
from dist_trainer.tracking.log_cursor import LogCursor
from dist_trainer.tracking.run_context import RunContext

log = logging.getLogger(__name__)

FOLLOWER = "dist_trainer.tracking.export_process"
SHOWN_BY_WANDB = ("WANDB_NAME", "WANDB_NOTES", "WANDB_TAGS", "WANDB_JOB_TYPE", "WANDB_RUN_GROUP", "WANDB_ENTITY")
"""Variables that W&B itself reads, and shows."""
SECONDS_TO_FINISH = 20.0
SECONDS_TO_STOP = 6.0
"""Where a signal or an error ended the run: who sent it waits for all of us to leave."""
SECONDS_TO_DIE = 5.0
"""After SIGKILL."""


@dataclass(frozen=True)
class FollowerRow:
    """What is particular to one of them."""

    label: str
    is_on: Callable[[TrackingConfig], bool]
    """Whether the config, or WANDB_MODE, asks for it."""
    details: Callable[[TrackingConfig], str]
    """What follows its label where a run says what is on."""
    must_be_installed: bool = True
    """Where it is on; else its package's absence costs a warning."""


def _wandb_mode(tracking: TrackingConfig) -> str:
    mode = os.environ.get("WANDB_MODE")
    return mode if mode in ("online", "offline", "disabled") else tracking.wandb


def _project(tracking: TrackingConfig) -> str:
    return tracking.wandb_project or os.environ.get("WANDB_PROJECT") or "dist_trainer"


FOLLOWERS = {
    "wandb": FollowerRow(
        "W&B",
        is_on=lambda tracking: _wandb_mode(tracking) != "disabled",
        details=lambda tracking: f" {_wandb_mode(tracking)} (project {_project(tracking)})",
        must_be_installed=False,
    ),
    "tensorboard": FollowerRow("TensorBoard", is_on=lambda tracking: tracking.tensorboard, details=lambda _: ""),
    "trackio": FollowerRow(
        "trackio",
        is_on=lambda tracking: tracking.trackio,
        details=lambda tracking: f" (project {_project(tracking)})",
    ),
}
"""Of TRACKERS; the name of a row is that of the package too, of the key, and of the row of the follower's SINKS."""


def refuse_missing_packages(tracking: TrackingConfig) -> None:
    """Raises ConfigError where a row was asked for whose package is optional, and is not there."""
    for row, follower in FOLLOWERS.items():
        if follower.must_be_installed and follower.is_on(tracking) and importlib.util.find_spec(row) is None:
            raise ConfigError(
                f"tracking.{row}: true needs the package {row}, which is not installed; "
                f"install it (`{in_this_shell()} -m pip install {row}`), or set it to false"
            )


class SubprocessTracker:
    """Starts the follower, tells it when there is news, and passes on what it has to say."""

    def __init__(self, context: RunContext, row: str) -> None:
        """Start the follower; one warning where the package is missing or the process cannot start."""
        self._label = FOLLOWERS[row].label
        self._can_catch_up = row == "wandb" and _wandb_mode(context.config.tracking) == "online"
        """Whether the same command sends what is missing even where the run has finished."""
        self._process: subprocess.Popen[bytes] | None = None
        self._patience_ends: float | None = None
        if importlib.util.find_spec(row) is None:
            log.warning("tracking.%s: the package %s is not installed; going on without %s", row, row, self._label)
            return
        output = f"logs/{row}.log"  # what the package itself prints
        try:
            self._process = _start_follower(context.folder / output)
        except OSError as error:
            log.warning(
                "tracking.%s: its process could not be started (%s); going on without %s", row, error.strerror, self._label
            )
            return
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        self._tell(json.dumps(_description(context, row)).encode() + b"\n")
        # From here on a follower that is slow to read never blocks: a full pipe holds news enough.
        os.set_blocking(self._pipe, False)
        words = (self._process, self._label, output)
        self._ear = threading.Thread(target=_pass_on_messages, args=words, name=f"{row} messages", daemon=True)
        self._ear.start()

    def log(self, line: dict[str, Any]) -> None:
        """Say that metrics.jsonl has grown."""
        self._tell(b"\n")

    def sync(self) -> None:
        """Nothing: metrics.jsonl is what must be durable."""

    def ask_to_finish(self, state: str) -> None:
        """Tell the follower how the run ended, and wait for nothing: `close` does, when all followers have been told."""
        if self._process is None or self._process.stdin is None or self._patience_ends is not None:
            return
        patience = _patience(state)
        self._patience_ends = time.monotonic() + patience
        # A follower that reads nothing any more must not block this either. Not `select`: it refuses descriptors above 1,023.
        writable = select.poll()
        writable.register(self._pipe, select.POLLOUT)
        writable.poll(1000 * patience)
        self._tell(b"\n" + json.dumps({"state": state}).encode() + b"\n")
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self, *, state: str, reason: str | None) -> None:
        """Let the follower finish for some seconds; say what it left undone."""
        self.ask_to_finish(state)
        process, ends = self._process, self._patience_ends
        if process is None or ends is None:
            return
        try:
            process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            _end(process)
            log.warning(
                "%s did not finish within %.0f s and was ended; metrics.jsonl has all%s",
                *(self._label, _patience(state)),
                ", and the same command adds the rest" if self._can_catch_up or state != "finished" else "",
            )
        self._ear.join(1.0)
        self._process = None

    def _tell(self, message: bytes) -> None:
        if self._process is None or self._process.stdin is None or self._process.stdin.closed:
            return
        # Where this fails it has news enough to read already, or it has gone, and the ear passes on why.
        with contextlib.suppress(OSError):
            os.write(self._pipe, message)


def lacks_lines_online(folder: Path, tracking: TrackingConfig) -> bool:
    """Whether W&B is online, and its server is not known to have had all of the run in `folder`."""
    return _wandb_mode(tracking) == "online" and not LogCursor.read(folder, "wandb").has_arrived


def send_lines_online(context: RunContext) -> None:
    """Send what W&B's server lacks of a run that has finished; what goes wrong costs a warning."""
    try:
        SubprocessTracker(context, "wandb").close(state="finished", reason=None)
    except Exception as error:
        log.warning("W&B could not be sent what it lacks of this run (%s: %s)", type(error).__name__, error)


def _patience(state: str) -> float:
    return SECONDS_TO_FINISH if state == "finished" else SECONDS_TO_STOP


def _start_follower(output: Path) -> subprocess.Popen[bytes]:
    package_parent = str(Path(__file__).parents[2])
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment |= {name: masked(environment[name]) for name in SHOWN_BY_WANDB if name in environment}
    with output.open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", FOLLOWER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            # Out of reach of Ctrl-C and of signals to the job's process group: it ends when this process does.
            start_new_session=True,
        )


def _description(context: RunContext, row: str) -> dict[str, Any]:
    tracking = context.config.tracking
    what_it_shows = {
        "project": _project(tracking),
        "entity": tracking.wandb_entity,
        "group": tracking.wandb_group or os.environ.get("WANDB_RUN_GROUP"),
        "tags": [tag.strip() for tag in (tracking.wandb_tags or "").split(",") if tag.strip()] or None,
        "name": context.config.run_name,
        "config": {
            **as_dict(context.config),
            "parameters": context.parameters,
            "max_steps": context.max_steps,
            "environment": context.environment,
        },
    }
    return {
        "sink": row,
        "label": FOLLOWERS[row].label,
        "folder": str(context.folder.resolve()),
        "mode": _wandb_mode(tracking),
        "code": str(Path(__file__).parents[1]) if tracking.wandb_code else None,
        "trainer_pid": os.getpid(),
        **masked_within(what_it_shows),
    }


def rows_in_words(tracking: TrackingConfig) -> str:
    """Which of them are on: `W&B offline (project dist_trainer), TensorBoard`."""
    on = [f"{row.label}{row.details(tracking)}" for row in FOLLOWERS.values() if row.is_on(tracking)]
    return ", ".join(on) or "no W&B"


def _pass_on_messages(process: subprocess.Popen[bytes], label: str, output: str) -> None:
    """Log what the follower says, and once if it ends without having said that it would."""
    assert process.stdout is not None
    said_goodbye = False
    with process.stdout as messages:
        for text in messages:
            try:
                message = json.loads(text)
                level, words, said_goodbye = int(message["level"]), str(message["text"]), bool(message["last"])
            except (ValueError, KeyError, TypeError):
                continue
            log.log(level, "%s", words)
    code = process.wait()
    if not said_goodbye and code != -signal.SIGKILL:
        log.warning("%s: its process ended by itself (exit code %d, see %s); training goes on", label, code, output)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the follower and what it started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one in a system call of a dead disk does not die of it
        process.wait(SECONDS_TO_DIE)
