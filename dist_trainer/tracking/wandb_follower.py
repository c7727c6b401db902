"""The process that speaks to Weights & Biases: follows metrics.jsonl and logs what it finds. Started by wandb_tracker.

On stdin: one line of JSON that describes the run, an empty line for each piece of news, one line of JSON with the state in
which the run ended. End of file without that line means that training was killed. On stdout: messages for the log.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dist_trainer.tracking.lenient_json import number
from dist_trainer.tracking.run_context import METRICS_FILE
from dist_trainer.tracking.run_history import whole_lines
from dist_trainer.tracking.wandb_position import Position, run_id

INIT_TIMEOUT_SECONDS = 30.0
PROBE_TIMEOUT_SECONDS = 5.0
NOT_METRICS = {"kind", "step", "time", "non_finite", "prompt", "text"}
SAMPLES_IN_TABLE = 64
"""The latest ones: W&B keeps each logged table whole, so one that only grew would fill its disk."""

Say = Callable[..., None]


class Follower:
    """One run in W&B."""

    def __init__(self, description: dict[str, Any], say: Say) -> None:
        """Open the run, online if asked for and possible; raises whatever W&B raises where not even offline works."""
        self.folder = Path(description["folder"])
        self.position = Position.read(self.folder)
        self.best: tuple[float, int] | None = None
        self._samples: deque[Iterable[Any]] = deque(maxlen=SAMPLES_IN_TABLE)
        self._read_bytes = 0
        self._run, self.is_online = _open_run(description, run_id(self.folder), say)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("validation/loss", step_metric="step", summary="min")

    def catch_up(self) -> None:
        """Log the lines that have been added."""
        for text, end in whole_lines(self.folder / METRICS_FILE, start=self._read_bytes):
            self._read_bytes = end
            line = read_line(text)
            if line is None:
                continue
            self._note_best(line)
            if line["kind"] == "sample":
                self._samples.append([line["step"], str(line.get("prompt")), str(line.get("text"))])
            if not self.position.passes(line):
                self.position.advance(line, self.folder)
                # The step is given twice: as W&B's own counter it keeps a resumed run in order and joins what belongs
                # to one step in one row, as a metric it is the axis of every chart.
                self._run.log(self._row(line), step=line["step"])

    def finish(self, closing: dict[str, Any]) -> None:
        """Close the run with the state it ended in."""
        state = closing.get("state")
        self._run.summary["state"] = state or "killed"
        if state == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state == "finished" else 1)

    def _row(self, line: dict[str, Any]) -> dict[str, Any]:
        kind, row = line["kind"], {"step": line["step"]}
        non_finite = line.get("non_finite")
        values = {**line, **(non_finite if isinstance(non_finite, dict) else {})}
        for name, value in values.items():
            if name not in NOT_METRICS and value is not None:
                row[f"{kind}/{name}"] = _as_number(value)
        if kind == "sample":
            row["samples"] = _table(list(self._samples))
        return row

    def _note_best(self, line: dict[str, Any]) -> None:
        loss = number(line.get("loss"))
        if line["kind"] == "validation" and loss == loss and (self.best is None or loss < self.best[0]):
            self.best = (loss, line["step"])
            self._run.summary.update({"best_validation_loss": loss, "best_step": line["step"]})


def read_line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    good = isinstance(line, dict) and isinstance(line.get("kind"), str) and type(line.get("step")) is int
    return line if good and line["step"] >= 0 else None


def _as_number(value: Any) -> Any:
    """Booleans as 0 and 1, the names of non-finite numbers as these; all else as it is."""
    if isinstance(value, bool):
        return int(value)
    return float(value) if value in ("nan", "inf", "-inf") else value


def _table(samples: list[Iterable[Any]]) -> Any:
    import wandb

    columns: list[Any] = ["step", "prompt", "text"]
    return wandb.Table(columns=columns, data=samples)


def _open_run(description: dict[str, Any], identity: str, say: Say) -> tuple[Any, bool]:
    """The W&B run, and whether it is online."""
    import wandb

    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "init_timeout": INIT_TIMEOUT_SECONDS,
        "x_stats_pid": description["trainer_pid"],
        # What the run ran on stands in its config; W&B's own search would add the repository's address and the user.
        "disable_git": True,
        "disable_code": True,
        "disable_job_creation": True,
        "x_disable_meta": True,
        "x_save_requirements": False,
    }
    settings = wandb.Settings(**{k: v for k, v in wanted.items() if k in wandb.Settings.model_fields})

    def init(mode: Any, **more: Any) -> Any:
        return wandb.init(
            dir=description["folder"],
            id=identity,
            project=description["project"],
            entity=description["entity"],
            name=description["name"],
            config=description["config"],
            settings=settings,
            mode=mode,
            **more,
        )

    if description["mode"] == "online":
        try:
            _reach(wandb.setup().settings.base_url)
            return init("online", resume="allow"), True
        except Exception as error:
            say(f"W&B cannot be used online ({_in_one_line(error)}); recording offline instead", logging.WARNING)
            wandb.teardown()
    return init("offline"), False


def _reach(base_url: str) -> None:
    """Raise OSError where W&B's server does not answer in seconds: `wandb.init` alone would try for minutes."""
    address = urlsplit(base_url)
    if address.hostname and not any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "http_proxy")):
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), PROBE_TIMEOUT_SECONDS).close()


def _in_one_line(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) < 200 else f"{words[:200]}..."


def _messenger() -> Say:
    """A function that sends messages to the trainer; stdout itself goes to stderr from here on, with all W&B prints."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(text: str, level: int = logging.INFO, *, last: bool = False) -> None:
        try:
            channel.write(json.dumps({"text": text, "level": level, "last": last}) + "\n")
            channel.flush()
        except OSError:
            pass  # training has gone

    return say


def _listen(stdin: int) -> Iterator[dict[str, Any] | None]:
    """None for news, as often as there may be some; at the end how the run ended, {} where it was killed."""
    buffer = b""
    while block := os.read(stdin, 1 << 16):
        *lines, buffer = (buffer + block).split(b"\n")
        told = [line for line in lines if line]
        if told:
            yield json.loads(told[-1])
            return
        yield None
    yield {}


def main() -> None:
    """Follow one run to its end."""
    for number_ in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number_, signal.SIG_IGN)  # this process ends when training does
    say = _messenger()
    # Unbuffered: what follows the first line is read from the descriptor itself.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as unbuffered:
        description = json.loads(unbuffered.readline())
    folder = description["folder"]
    # Without this, tables would be kept under the user's home until they are sent.
    os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_CACHE_DIR"] = f"{folder}/wandb"
    try:
        follower = Follower(description, say)
        follower.catch_up()
        for closing in _listen(sys.stdin.fileno()):
            follower.catch_up()
            if closing is not None:
                follower.finish(closing)
    except Exception as error:
        say(f"W&B has stopped ({_in_one_line(error)}); training goes on without it", logging.WARNING, last=True)
        raise
    if follower.is_online:
        say("W&B has everything", last=True)
    else:
        say(f"W&B: recorded offline; `wandb sync {folder}/wandb/offline-run-*` sends it", last=True)


if __name__ == "__main__":
    main()
