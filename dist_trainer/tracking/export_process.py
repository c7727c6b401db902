"""The process that follows metrics.jsonl and sends its lines to W&B, TensorBoard or trackio.

On stdin: one line of JSON that describes the run and names an entry of SINKS, an empty line whenever metrics.jsonl has grown,
one line of JSON with the state in which the run ended. End of file without that line means that training was killed.
On stdout: messages for the log.
"""

from __future__ import annotations

import json
import logging
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
from dist_trainer.errors import first_line
from dist_trainer.storage.locks import NO_LOCKS, try_lock
from dist_trainer.tracking.run_reader import METRICS_FILE, complete_lines, parse_line
from dist_trainer.tracking.sink import NOT_SENT, SECONDS_ALONE, LogFn, Sink
from dist_trainer.tracking.tensorboard_sink import TensorBoardSink
from dist_trainer.tracking.trackio_sink import TrackioSink
from dist_trainer.tracking.wandb_sink import WandbSink

SINKS: dict[str, Callable[[dict[str, Any], LogFn], Sink]] = {
    "wandb": WandbSink,
    "tensorboard": TensorBoardSink,
    "trackio": TrackioSink,
}
"""Sinks by the names in EXPORTS. They are separate from it so that the trainer does not import them."""


def send_lines(sink: Sink, path: Path, start: int) -> int:
    """Give `sink` the lines of `path` from byte `start` on; returns the position after the last one."""
    for text, end in complete_lines(path, start=start):
        start = end
        if (line := parse_line(text)) is not None and line["kind"] not in NOT_SENT:
            sink.take(line)
    return start


def _open_log() -> LogFn:
    """A function that sends messages to the trainer. From here on, whatever is printed to stdout goes to stderr."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def log(text: str, level: int = logging.INFO, *, last: bool = False) -> None:
        try:
            channel.write(json.dumps({"text": text, "level": level, "last": last}) + "\n")
            channel.flush()
        except OSError:
            pass  # training has ended

    return log


class TrainerMessages:
    """What training sends. A thread receives it, even while this process waits for a server or an earlier process."""

    def __init__(self, stdin: int) -> None:
        self.was_killed = threading.Event()
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._receive, args=(stdin,), name="training", daemon=True).start()

    def _receive(self, stdin: int) -> None:
        for message in _read_messages(stdin):
            if message == {}:
                signal.alarm(round(SECONDS_ALONE))  # nothing else ends this process if a server does not answer
                self.was_killed.set()
            self._messages.put(message)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        """None when there may be new lines; finally the state in which the run ended, or {} if it was killed."""
        message = None
        while message is None:
            message = self._messages.get()
            while message is None and not self._messages.empty():
                message = self._messages.get()
            yield message


def _read_messages(stdin: int) -> Iterator[dict[str, Any] | None]:
    """None for each message that there are new lines; finally the state in which the run ended, or {} if it was killed."""
    buffer = b""
    while block := os.read(stdin, 1 << 16):
        *lines, buffer = (buffer + block).split(b"\n")
        messages = [line for line in lines if line]
        if messages:
            yield json.loads(messages[-1])
            return
        yield None
    yield {}


def _wait_for_earlier_process(path: Path, messages: TrainerMessages) -> None:
    """Lock `path` until this process ends, after the export process of an earlier, killed attempt has sent what it had: two at
    the same time would overwrite each other's lines. Continues without a lock if the file system has none, or after a while.

    Exits if training is killed meanwhile: the process that holds the lock, or the next one, reads its lines too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + SECONDS_ALONE + 5.0
    while time.monotonic() < deadline:
        try:
            if try_lock(path) is not None:
                return  # it is never unlocked: the lock lasts as long as the process
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return
        if messages.was_killed.wait(0.1):
            sys.exit()


def main() -> None:
    """Follow one run to its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # this process ends when training does
    os.nice(10)  # imports take seconds of a core and must not slow the first steps if there are few cores
    log = _open_log()
    sys.stdout, sys.stderr = MaskedStream(sys.stdout), MaskedStream(sys.stderr)  # both are logs/NAME.log now
    # Unbuffered: everything after the first line is read from the descriptor itself.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as unbuffered:
        description = json.loads(unbuffered.readline())
    messages, folder, label = TrainerMessages(sys.stdin.fileno()), Path(description["folder"]), description["label"]
    try:
        _wait_for_earlier_process(folder / "logs" / f"{description['sink']}.lock", messages)
        sink = SINKS[description["sink"]](description, log)
        position = send_lines(sink, folder / METRICS_FILE, 0)
        for ending in messages:
            position = send_lines(sink, folder / METRICS_FILE, position)
            if ending is not None:
                sink.finish(ending.get("state") or "killed")
    except Exception as error:
        log(f"{label} has stopped ({first_line(error)}); training continues without it", logging.WARNING, last=True)
        raise
    log(f"{label}: {sink.summary()}", last=True)


if __name__ == "__main__":
    main()
