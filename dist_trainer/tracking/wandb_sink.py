"""Weights & Biases: an online run, or files that `wandb sync` sends later."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import socket
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dist_trainer.config.command_line import command_path
from dist_trainer.errors import first_line
from dist_trainer.storage.files import replace_file
from dist_trainer.tracking.run_reader import number, text_of
from dist_trainer.tracking.sink import LogCursor, LogFn, metrics_of

FOLDER = "wandb"
INIT_TIMEOUT_SECONDS = 30.0
PROBE_TIMEOUT_SECONDS = 5.0
MAX_SAMPLES = 500
"""Rows kept in the table of samples (the newest): the table is sent again with each sample."""
_GOOD_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class WandbSink:
    """One run in W&B."""

    def __init__(self, description: dict[str, Any], log: LogFn) -> None:
        """Open the run, online if configured and possible; raises whatever W&B raises if not even offline works."""
        self._folder = Path(description["folder"])
        # Otherwise tables are kept in the user's home until they are sent.
        os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_CACHE_DIR"] = str(self._folder / FOLDER)
        self._cursor = LogCursor.read(self._folder, FOLDER)
        self._best: tuple[float, int] | None = None
        self._samples: list[Any] = []
        self._log = self._folder / "logs" / "wandb.log"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._run, self._is_online = _open_run(description, run_id(self._folder), log)
        if self._is_online and not (self._cursor.is_synced and self._run.resumed):
            # Lines that an earlier attempt logged may be lost, or be in files for `wandb sync`: ask the server.
            self._cursor = LogCursor(self._run.starting_step)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("validation/loss", step_metric="step", summary="min")
        if description["code"] is not None:
            self._run.log_code(description["code"], name=f"source-{self._run.id}", include_fn=lambda path: path.endswith(".py"))

    def take(self, line: dict[str, Any]) -> None:
        """Log the line, unless it was logged before; the best loss and the samples come from all lines."""
        self._update_summary(line)
        if self._cursor.has_passed(line):
            return
        self._cursor.advance(line, self._folder, FOLDER)
        # The step is given twice: as W&B's step counter it keeps a resumed run in order and combines all lines of a step; as a
        # metric it is the x-axis of every chart.
        self._run.log(self._row(line), step=line["step"])

    def finish(self, state: str) -> None:
        """Close the run with the state that it ended in."""
        self._run.summary["state"] = state
        if state == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state == "finished" else 1)
        if self._is_online and not self._gave_up():
            self._cursor.mark_synced(self._folder, FOLDER)
            _mark_offline_files_synced(self._folder / FOLDER, self._run.id)

    def summary(self) -> str:
        """Where the run is, or how to upload it."""
        if self._is_online and not self._cursor.is_synced:
            return f"its server refused part of {self._run.url} (see {self._log}); the same command sends what is missing"
        if self._is_online:
            return f"complete at {self._run.url}"
        folders = f"{shlex.quote(str(self._folder))}/wandb/offline-run-*"
        return f"recorded offline; upload it with `{command_path('wandb')} sync {folders}`"

    def _gave_up(self) -> bool:
        """Whether W&B stopped sending. Its `finish` then returns normally, and only its printed output says so."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._log_start)
                return b"will not be synced" in file.read()
        except OSError:
            return False

    def _row(self, line: dict[str, Any]) -> dict[str, Any]:
        row = {"step": line["step"], **metrics_of(line)}
        if line["kind"] == "sample":
            row["samples"] = _table(self._samples)
        if line["kind"] == "validation" and self._best is not None:
            row["validation/best_loss"] = self._best[0]  # a plain metric, for sweeps
        return row

    def _update_summary(self, line: dict[str, Any]) -> None:
        if line["kind"] == "sample":
            self._samples.append([line["step"], str(line.get("prompt")), str(line.get("text"))])
            del self._samples[:-MAX_SAMPLES]
        loss = number(line.get("loss"))
        if line["kind"] == "validation" and loss == loss and (self._best is None or loss < self._best[0]):
            self._best = (loss, line["step"])
            self._run.summary.update({"best_validation_loss": loss, "best_step": line["step"]})


def run_id(folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """The W&B id of the run in `folder`: initially WANDB_RUN_ID (set by sweeps) or random, then fixed."""
    path = folder / FOLDER / "run_id"
    saved = text_of(path).strip()
    if _GOOD_ID.fullmatch(saved):  # W&B names folders after it
        return saved
    chosen = environment.get("WANDB_RUN_ID", "")
    if not _GOOD_ID.fullmatch(chosen):
        chosen = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [chosen.encode() + b"\n"], durable=True)
    return chosen


def _mark_offline_files_synced(folder: Path, identity: str) -> None:
    """Make `wandb sync` skip what was recorded offline, since the server now has it."""
    for recorded in folder.glob(f"offline-run-*/run-{identity}.wandb"):
        recorded.with_suffix(".wandb.synced").touch()


def _table(rows: list[Any]) -> Any:
    import wandb

    columns: list[Any] = ["step", "prompt", "text"]
    return wandb.Table(columns=columns, data=rows)


def _open_run(description: dict[str, Any], identity: str, log: LogFn) -> tuple[Any, bool]:
    """The W&B run, and whether it is online."""
    import wandb

    options: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "init_timeout": INIT_TIMEOUT_SECONDS,
        "x_stats_pid": description["trainer_pid"],
        # The environment is in the run's config; W&B's own detection would add the repository's address and the user.
        "disable_git": True,
        "disable_code": True,
        "disable_job_creation": True,
        "x_disable_meta": True,
        "x_save_requirements": False,
    }
    settings = wandb.Settings(**{k: v for k, v in options.items() if k in wandb.Settings.model_fields})

    def init(mode: Any, **more: Any) -> Any:
        return wandb.init(
            dir=description["folder"],
            id=identity,
            project=description["project"],
            entity=description["entity"],
            # W&B fills in None from its environment variables.
            name=None if os.environ.get("WANDB_NAME") else description["name"],
            group=description["group"],
            tags=description["tags"],
            config=description["config"],
            settings=settings,
            mode=mode,
            **more,
        )

    if description["mode"] == "online":
        try:
            _reach(wandb.setup().settings.base_url)
            run = init("online", resume="allow")
            log(f"W&B: {run.url}")
            return run, True
        except Exception as error:
            log(f"W&B cannot be used online ({first_line(error)}); recording offline instead", logging.WARNING)
            wandb.teardown()
    return init("offline"), False


def _reach(base_url: str) -> None:
    """Raises OSError if W&B's server does not answer within seconds: `wandb.init` by itself would try for minutes."""
    address = urlsplit(base_url)
    if address.hostname and not any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "http_proxy")):
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), PROBE_TIMEOUT_SECONDS).close()
