"""How a command ends: errors as messages, secrets masked, output flushed, and an exit code that none of this changes."""

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

from dist_trainer.config.paths import ensure_home
from dist_trainer.config.secrets import MaskedStream, masked
from dist_trainer.distributed.launch_env import RankInfo, rank_info_or_none
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

HOLD_BACK_SECONDS = 5.0
"""How long the ranks that print nothing wait for the one that prints."""


def run_cli(command: Callable[[], int]) -> int:
    """The exit code of `command`; a DistTrainerError is printed, once per machine, and becomes its exit code.

    Secrets are masked in everything that goes to stderr. A closed stdout does not change the exit code.
    """
    open_standard_streams()
    ensure_home()
    before = sys.stderr
    sys.stderr = MaskedStream(before)
    try:
        return command()
    except DistTrainerError as error:
        return exit_on_error(error)
    except KeyboardInterrupt:
        return EXIT_PREEMPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_stdout_unread():
            return EXIT_FINISHED
        if (missing := missing_package(error)) is not None:
            return exit_on_error(missing)
        print(masked(traceback.format_exc()), end="", file=sys.stderr)  # a secret may have several lines
        _exit_now(EXIT_CRASHED)
    finally:
        sys.stderr = before
        flush_standard_streams()


def end_process(code: int) -> NoReturn:
    """sys.exit without the interpreter's clean-up, which, once torch is imported, takes 0.7 s of CPU time per rank while the
    launcher waits. Threads are joined, exit handlers called, and output flushed.
    """

    def end() -> None:
        # Registered last, so called first, after all threads have ended; it calls the other handlers.
        atexit.unregister(end)
        atexit._run_exitfuncs()
        _exit_now(code)

    if hasattr(atexit, "_run_exitfuncs"):
        atexit.register(end)
    sys.exit(code)


def _exit_now(code: int) -> NoReturn:
    """Exit without clean-up: while ranks are still connected, the interpreter's may wait for them forever."""
    flush_standard_streams()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)  # output of C libraries such as NCCL
    os._exit(code)


# ------------------------------------------------------------------------------------------------ errors


def exit_on_error(error: DistTrainerError) -> int:
    """Print the error, once per machine, and return its exit code; one of several ranks exits here.

    torchrun stops all ranks as soon as one has exited. So ranks that do not print wait for the launcher's signal, which means
    that the printing rank has exited, and no rank lets that signal change its exit code.
    """
    info = rank_info_or_none()
    is_single = info is not None and info.world_size == 1
    signalled = threading.Event() if is_single else _catch_stop_signals()
    if _prints(error, info):
        print(f"dist_trainer: {error}", file=sys.stderr)
    elif not isinstance(error, (PeerLostError, LauncherLostError, StoppedError)):
        signalled.wait(HOLD_BACK_SECONDS)
    if not is_single:
        _exit_now(error.exit_code)
    return error.exit_code


def _prints(error: DistTrainerError, info: RankInfo | None) -> bool:
    """Whether this process prints the error; without rank info it does, since no other process is known to."""
    if info is None:
        return True
    if isinstance(error, PeerLostError) and error.printed_by is not None:
        return info.rank == error.printed_by
    return info.local_rank == 0


def _catch_stop_signals() -> threading.Event:
    """Make the stop signals only set the event from now on."""
    signalled = threading.Event()
    if threading.current_thread() is threading.main_thread():  # the only thread that may set handlers
        for number in heeded_stop_signals():
            signal.signal(number, lambda *_: signalled.set())
    return signalled


def missing_package(error: Exception) -> MissingPackageError | None:
    """The error to raise if `error` says that this package could not import another one; otherwise None."""
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


# ------------------------------------------------------------------------------------------------ standard streams


def open_standard_streams() -> None:
    """Open /dev/null for standard streams that were closed at the start: otherwise the next files to be opened would get their
    descriptors and receive whatever is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))  # the lowest free number


def flush_standard_streams() -> None:
    """Flush stdout and stderr. A stream that cannot be written is replaced by /dev/null, because the interpreter flushes both
    at exit and returns 120 if that fails.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                stream.flush()


def is_stdout_unread() -> bool:
    """Whether stdout is a pipe whose reader, such as `head`, has exited."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
