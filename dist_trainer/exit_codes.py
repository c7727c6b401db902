"""How commands end: the exit codes that scripts and schedulers rely on, and errors as sentences."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from dist_trainer.errors import DistTrainerError, PeerLostError

EXIT_FINISHED = 0
EXIT_CRASHED = 1
EXIT_PREEMPTED = 75
"""Stopped by a signal after saving; EX_TEMPFAIL of sysexits.h: the same command goes on from there."""


def exit_code_of(act: Callable[[], int]) -> int:
    """What `act` returns; of a DistTrainerError its exit code, after its message was printed once over all ranks."""
    try:
        return act()
    except DistTrainerError as error:
        if speaks():
            print(f"dist_trainer: {error}", file=sys.stderr)
        if isinstance(error, PeerLostError):
            _end_at_once(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_PREEMPTED
    except Exception:
        traceback.print_exc()
        _end_at_once(EXIT_CRASHED)


def _end_at_once(code: int) -> NoReturn:
    """Not sys.exit: with ranks still connected, the interpreter's own clean-up can wait for them for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def speaks() -> bool:
    """Whether this is the one rank that prints what all of them found; known before any rank is connected."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
