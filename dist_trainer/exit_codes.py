"""How commands end: the exit codes that scripts and schedulers rely on, and errors as sentences."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from dist_trainer.errors import ConfigError, DistTrainerError, PeerLostError, StoppedError
from dist_trainer.place import Place, place_of_this_process
from dist_trainer.secrets import masked

EXIT_FINISHED = 0
EXIT_CRASHED = 1
EXIT_PREEMPTED = 75
"""Stopped by a signal after saving; EX_TEMPFAIL of sysexits.h: the same command goes on from there."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What asks a run to stop."""
HOLD_BACK_SECONDS = 5.0
"""How long ranks that don't speak let the one that does go first."""


def exit_code_of(act: Callable[[], int]) -> int:
    """What `act` returns; of a DistTrainerError its exit code, after its message was printed once on each machine."""
    try:
        return act()
    except DistTrainerError as error:
        return leave_with(error)
    except KeyboardInterrupt:
        return EXIT_PREEMPTED
    except Exception:
        print(masked(traceback.format_exc()), end="", file=sys.stderr)
        _end_at_once(EXIT_CRASHED)


def leave_with(error: DistTrainerError) -> int:
    """Print the error, once on each machine; the code to exit with. One of several ranks ends in here.

    As soon as any rank is gone, torchrun stops the others: who has nothing to say holds back until the one that does has
    left, which the launcher's signal tells, and nobody lets that signal change the exit code.
    """
    place = _place_or_none()
    alone = place is not None and place.world_size == 1
    told = threading.Event() if alone else _take_stop_signals()
    if place is None or place.local_rank == 0:  # without a place nobody knows who else could say it
        print(masked(f"dist_trainer: {error}"), file=sys.stderr)
    elif not isinstance(error, (PeerLostError, StoppedError)):
        told.wait(HOLD_BACK_SECONDS)
    if not alone:
        _end_at_once(error.exit_code)
    return error.exit_code


def _place_or_none() -> Place | None:
    try:
        return place_of_this_process()
    except ConfigError:
        return None


def _take_stop_signals() -> threading.Event:
    """From now on these signals do nothing but set the event."""
    told = threading.Event()
    if threading.current_thread() is threading.main_thread():  # Python delivers them there alone
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: told.set())
    return told


def _end_at_once(code: int) -> NoReturn:
    """Not sys.exit: with ranks still connected, the interpreter's own clean-up can wait for them for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
