"""A small process beside each rank that ends it once it is frozen: where all ranks of a machine are, nobody else there can.

The rank tells it once a second that it lives, and how long others are to bear its silence. A stopped process (SIGSTOP, or one
that a dying disk or driver holds) tells nothing; its launcher sees it alive and would wait for it for ever.

This file is the guard's program too, and there it can import the standard library alone.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

TELL_SECONDS = 1.0
PATIENCE_SECONDS = 600.0
"""Until the rank knows better: distributed.hang_timeout_minutes where that is null."""
MARGIN_SECONDS = 8.0
"""More than the rank's own patience: the other ranks should name it first, and end it where they can."""
_WORD = struct.Struct("d")


class Guard:
    """The rank's side: a guard over this process, until it ends."""

    def __init__(self) -> None:
        self.patience_seconds: Callable[[], float] = lambda: PATIENCE_SECONDS
        """How long others are to bear the silence of this process, from now on."""
        # As a program of its own it has little memory, and neither the name nor the rank of a rank. What it says goes the
        # way of this process's errors.
        environment = {name: value for name, value in os.environ.items() if "RANK" not in name}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            bufsize=0,
        )
        threading.Thread(target=self._tell, name="guard", daemon=True).start()

    def _tell(self) -> None:
        assert self._process.stdin is not None, "it is a pipe"
        try:
            while True:
                self._process.stdin.write(_WORD.pack(self.patience_seconds()))
                time.sleep(TELL_SECONDS)
        except OSError:
            return  # somebody ended the guard: the rank is worth more


def watch(rank: int, pipe: int) -> None:
    """The guard's side: kill the process `rank`, which started this one, when it has been silent for too long.

    Returns when it has ended. Its silence is counted by looks: time in which the whole machine or job was suspended, and
    this process with it, does not count.
    """
    patience, silent = PATIENCE_SECONDS, 0.0
    readable = select.poll()
    readable.register(pipe, select.POLLIN)
    while silent <= patience + MARGIN_SECONDS:
        if readable.poll(1000 * TELL_SECONDS):
            words = os.read(pipe, 512 * _WORD.size)
            if not words:
                return
            patience, silent = _WORD.unpack(words[-_WORD.size :])[0], 0.0
        else:
            silent += TELL_SECONDS
        if os.getppid() != rank:  # forked data workers may hold the pipe open
            return
    print(f"dist_trainer: process {rank} has been frozen for {silent:.0f} s and is ended", file=sys.stderr, flush=True)
    os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # the launcher sends them to the rank's whole process group
    watch(int(sys.argv[1]), sys.stdin.fileno())
