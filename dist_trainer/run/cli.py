"""How commands end: the exit codes that scripts and schedulers rely on, and errors as sentences."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dist_trainer.config.secrets import MaskedStream, masked
from dist_trainer.distributed.launch_env import Place, place_or_none
from dist_trainer.distributed.signals import heeded_stop_signals
from dist_trainer.errors import (
    EXIT_CRASHED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    DistTrainerError,
    LauncherLostError,
    MissingPackageError,
    PeerLostError,
    StoppedError,
)
from dist_trainer.storage.cache_dir import ensure_home

HOLD_BACK_SECONDS = 5.0
"""How long ranks that don't speak let the one that does go first."""


def run_cli(act: Callable[[], int]) -> int:
    """What `act` returns; of a DistTrainerError its exit code, after its message was printed once on each machine. Secrets
    are masked in all that is printed to stderr. If nobody reads what is printed, the exit code stays the same.
    """
    open_standard_streams()
    ensure_home()
    before = sys.stderr
    sys.stderr = MaskedStream(before)
    try:
        return act()
    except DistTrainerError as error:
        return exit_on_error(error)
    except KeyboardInterrupt:
        return EXIT_PREEMPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads_stdout():
            return EXIT_FINISHED
        if (missing := missing_package(error)) is not None:
            return exit_on_error(missing)
        print(masked(traceback.format_exc()), end="", file=sys.stderr)  # a secret may have several lines
        _end_at_once(EXIT_CRASHED)
    finally:
        sys.stderr = before
        flush_standard_streams()


def open_standard_streams() -> None:
    """Open /dev/null in place of standard streams that were closed at the start: the next files to be opened would get their
    numbers, and receive whatever is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))  # the lowest number that is free


def flush_standard_streams() -> None:
    """Flush stdout and stderr. One that cannot be written becomes /dev/null: the interpreter flushes both at its end, and exits
    with 120 where that fails.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                stream.flush()


def nobody_reads_stdout() -> bool:
    """Whether stdout is a pipe whose reader, such as `head`, has gone."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def missing_package(error: Exception) -> MissingPackageError | None:
    """The refusal to raise if `error` says that this package could not import another one; otherwise None."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = Path(__file__).parents[1]
    if not Path(frame.f_code.co_filename).is_relative_to(package) or error.name.startswith(f"{package.name}."):
        return None
    checkout, python = package.parent, package.parent / ".venv" / "bin" / "python"
    if python.exists() and python.parent != Path(sys.executable).parent:
        remedy = f"use {python}, or activate its environment: source {python.with_name('activate')}"
    elif (checkout / "Makefile").exists():
        remedy = f"run `make setup` in {checkout} and use {python}"
    else:
        remedy = f"install it: {sys.executable} -m pip install dist_trainer"
    return MissingPackageError(f"the package {error.name.partition('.')[0]} is not installed for {sys.executable}; {remedy}")


def exit_on_error(error: DistTrainerError) -> int:
    """Print the error, once on each machine; the code to exit with. One of several ranks ends in here.

    As soon as any rank is gone, torchrun stops the others: who has nothing to say holds back until the one that does has
    left, which the launcher's signal tells, and nobody lets that signal change the exit code.
    """
    place = place_or_none()
    alone = place is not None and place.world_size == 1
    told = threading.Event() if alone else _take_stop_signals()
    if _says(error, place):
        print(f"dist_trainer: {error}", file=sys.stderr)
    elif not isinstance(error, (PeerLostError, LauncherLostError, StoppedError)):
        told.wait(HOLD_BACK_SECONDS)
    if not alone:
        _end_at_once(error.exit_code)
    return error.exit_code


def _says(error: DistTrainerError, place: Place | None) -> bool:
    """Whether this process is the one to say it: without a place nobody knows who else could."""
    if place is None:
        return True
    if isinstance(error, PeerLostError) and error.told_by is not None:
        return place.rank == error.told_by
    return place.local_rank == 0


def _take_stop_signals() -> threading.Event:
    """From now on these signals do nothing but set the event."""
    told = threading.Event()
    if threading.current_thread() is threading.main_thread():  # Python delivers them there alone
        for number in heeded_stop_signals():
            signal.signal(number, lambda *_: told.set())
    return told


def end_process(code: int) -> NoReturn:
    """sys.exit without the interpreter's own clean-up, for which a launcher would wait: with torch imported it takes 0.7 s of
    CPU time in each rank, and has nothing left to do. Threads are joined, exit handlers called, and output flushed.
    """

    def end() -> None:
        # Registered last, it is called first, after all threads: the other handlers, then, are called here.
        atexit.unregister(end)
        atexit._run_exitfuncs()
        _end_at_once(code)

    if hasattr(atexit, "_run_exitfuncs"):
        atexit.register(end)
    sys.exit(code)


def _end_at_once(code: int) -> NoReturn:
    """Not sys.exit: with ranks still connected, the interpreter's own clean-up can wait for them for ever."""
    flush_standard_streams()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)  # what C libraries such as NCCL have printed
    os._exit(code)
