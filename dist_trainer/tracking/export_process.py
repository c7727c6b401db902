"""The process that brings a run's lines somewhere else: follows metrics.jsonl. Started by follower_tracker.

On stdin: one line of JSON that describes the run and names a row of SINKS, an empty line for each piece of news, one line of
JSON with the state in which the run ended. End of file without that line means that training was killed. On stdout: messages
for the log.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_trainer.config.secrets import MaskedStream
from dist_trainer.tracking.lenient_json import parse_object
from dist_trainer.tracking.run_context import METRICS_FILE
from dist_trainer.tracking.run_reader import whole_lines
from dist_trainer.tracking.sink import SECONDS_ALONE, Say, Sink, in_one_line
from dist_trainer.tracking.tensorboard_sink import TensorBoardSink
from dist_trainer.tracking.trackio_sink import TrackioSink
from dist_trainer.tracking.wandb_sink import WandbSink

SINKS: dict[str, Callable[[dict[str, Any], Say], Sink]] = {
    "wandb": WandbSink,
    "tensorboard": TensorBoardSink,
    "trackio": TrackioSink,
}
"""By row of follower_tracker's FOLLOWERS, from its description of the run; apart, for this process alone imports them."""


class Follower:
    """Hands on the lines that have been added."""

    def __init__(self, sink: Sink, folder: Path) -> None:
        self._sink = sink
        self._path = folder / METRICS_FILE
        self._read_bytes = 0

    def catch_up(self) -> None:
        """Read to the end of the file as it is now."""
        for text, end in whole_lines(self._path, start=self._read_bytes):
            self._read_bytes = end
            line = read_line(text)
            if line is not None:
                self._sink.take(line)


def read_line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, however long its sample is; None where it is none."""
    line = parse_object(text, longest=math.inf)
    if line is None or not isinstance(line.get("kind"), str) or type(line.get("step")) is not int:
        return None
    return line if line["step"] >= 0 else None


def _messenger() -> Say:
    """A function that sends messages to the trainer; stdout itself goes to stderr from here on, with all a sink prints."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(text: str, level: int = logging.INFO, *, last: bool = False) -> None:
        try:
            channel.write(json.dumps({"text": text, "level": level, "last": last}) + "\n")
            channel.flush()
        except OSError:
            pass  # training has gone

    return say


class Training:
    """What training says, heard as it comes: also while this process waits for a server, or for an earlier life's follower."""

    def __init__(self, stdin: int) -> None:
        self.was_killed = threading.Event()
        self._news: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._hear, args=(stdin,), name="training", daemon=True).start()

    def _hear(self, stdin: int) -> None:
        for told in _listen(stdin):
            if told == {}:
                signal.alarm(round(SECONDS_ALONE))  # nobody else ends this process where a server does not answer
                self.was_killed.set()
            self._news.put(told)

    def news(self) -> Iterator[dict[str, Any] | None]:
        """None for news, as often as there may be some; at the end how the run ended, {} where it was killed."""
        told = None
        while told is None:
            told = self._news.get()
            while told is None and not self._news.empty():
                told = self._news.get()
            yield told


def _wait_for_earlier_life(path: Path, training: Training) -> int:
    """A lock on `path` until this process ends, so that an earlier life of the run, killed, has sent what it had: two that sent
    at the same time would overwrite one another's rows. Where the file system has no locks, or it takes too long, no lock.

    Leaves where training was killed meanwhile: whoever has the lock, or comes next, reads its lines too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    ends = time.monotonic() + SECONDS_ALONE + 5.0
    while time.monotonic() < ends:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                break
        if training.was_killed.wait(0.1):
            sys.exit()
    return file


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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # this process ends when training does
    os.nice(10)  # where cores are few, imports that take seconds of one must not slow the first steps
    say = _messenger()
    sys.stdout, sys.stderr = MaskedStream(sys.stdout), MaskedStream(sys.stderr)  # both are logs/ROW.log now
    # Unbuffered: what follows the first line is read from the descriptor itself.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as unbuffered:
        description = json.loads(unbuffered.readline())
    training, folder = Training(sys.stdin.fileno()), Path(description["folder"])
    try:
        _wait_for_earlier_life(folder / "logs" / f"{description['sink']}.lock", training)
        sink = SINKS[description["sink"]](description, say)
        follower = Follower(sink, folder)
        follower.catch_up()
        for closing in training.news():
            follower.catch_up()
            if closing is not None:
                sink.finish(closing.get("state") or "killed")
    except Exception as error:
        say(
            f"{description['label']} has stopped ({in_one_line(error)}); training goes on without it",
            logging.WARNING,
            last=True,
        )
        raise
    say(f"{description['label']}: {sink.goodbye()}", last=True)


if __name__ == "__main__":
    main()
