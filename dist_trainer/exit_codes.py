"""How commands end: the exit codes that scripts and schedulers rely on, and errors as sentences."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from dist_trainer.errors import DistTrainerError

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
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_PREEMPTED
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: with ranks still connected, the interpreter's own clean-up can wait for them for ever.
        os._exit(EXIT_CRASHED)


def speaks() -> bool:
    """Whether this is the one rank that prints what all of them found; known before any rank is connected."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
