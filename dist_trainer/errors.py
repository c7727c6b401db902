"""The errors that end in a message and an exit code, in one tree.

    DistTrainerError
    ├── RefusedError           exit code 2: refused before the first step, nothing was changed
    │   ├── ConfigError        a key, a value, a combination of keys
    │   ├── DataError          a dataset, a file in it, a tokenizer
    │   ├── MissingPackageError    a package that is not installed
    │   ├── CheckpointError    a run folder or a checkpoint in it
    │   │   └── AnotherRunError    the run folder belongs to a run of another config or other data
    │   └── DoesNotFitError    memory ran out before there was a model to train; also an OutOfMemoryError
    ├── OutOfMemoryError       exit code 1: memory ran out
    ├── TrainingDivergedError  exit code 3: the loss or the gradients are not finite
    ├── RanksDisagreeError    exit code 3: ranks have different bits where they must be equal
    ├── SavingFailedError      exit code 1: checkpoints could not be saved, several times in a row
    ├── CallbackError          exit code 1: a callback raised; or the code of the DistTrainerError that it raised
    ├── PeerLostError          exit code 1: another rank has died
    ├── LauncherLostError      exit code 1: torchrun or srun has died; what was trained is saved
    └── StoppedError           exit code 75: a signal arrived before the first step; nothing to save

Each message names the key or path, the value, and the remedy; commands print it without a traceback.
"""

from __future__ import annotations

import signal

EXIT_FINISHED = 0
EXIT_CRASHED = 1
EXIT_DIFFERS = 1
"""`verify` has found a difference."""
EXIT_PREEMPTED = 75
"""Stopped by a signal after saving; EX_TEMPFAIL of sysexits.h: rerunning the same command resumes the run."""


class DistTrainerError(Exception):
    """Base of all errors that end in a message and an exit code."""

    exit_code = EXIT_CRASHED


class RefusedError(DistTrainerError):
    """The run was refused before its first step."""

    exit_code = 2


class ConfigError(RefusedError):
    """A config key, value, or combination of keys cannot be used."""


class DataError(RefusedError):
    """A dataset, one of its files, or a tokenizer cannot be used."""


class MissingPackageError(RefusedError):
    """A package that the command needs is not installed."""


class CheckpointError(RefusedError):
    """A run folder or a checkpoint cannot be used."""


class AnotherRunError(CheckpointError):
    """The run folder belongs to another run: one of another config, or of other data."""


class OutOfMemoryError(DistTrainerError):
    """Memory ran out, on the device or on the machine; possibly on this rank only."""

    def __init__(self, summary: str, advice: str = "") -> None:
        """`summary` is one line, `advice` further ones."""
        super().__init__(f"{summary}\n{advice}" if advice else summary)
        self.summary, self.advice = summary, advice

    def __reduce__(self) -> tuple[type[OutOfMemoryError], tuple[str, str]]:
        """Pickled by its parts, to travel between ranks."""
        return type(self), (self.summary, self.advice)


class DoesNotFitError(OutOfMemoryError, RefusedError):
    """Memory ran out before there was a model to train."""

    exit_code = RefusedError.exit_code


class TrainingDivergedError(DistTrainerError):
    """The loss or the gradients are not finite."""

    exit_code = 3


class RanksDisagreeError(DistTrainerError):
    """Ranks have different bits where they must be equal: memory or arithmetic of one of them has failed."""

    exit_code = 3


class SavingFailedError(DistTrainerError):
    """Checkpoints could not be saved, several times in a row."""


class CallbackError(DistTrainerError):
    """A callback raised an error, which ends the run on all ranks."""


class PeerLostError(DistTrainerError):
    """Another rank has died, and this one cannot continue without it."""

    def __init__(self, message: str, *, printed_by: int | None = None) -> None:
        """`printed_by`: the only rank that prints it; None: the first one of each machine."""
        super().__init__(message)
        self.printed_by = printed_by


class LauncherLostError(DistTrainerError):
    """The launcher of a rank has died; all ranks have saved and exit."""


class StoppedError(DistTrainerError):
    """A signal asked to stop before training began; there is nothing to save."""

    exit_code = EXIT_PREEMPTED

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal_name(signal_number)} before the first step; nothing to save, rerun to start")
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[type[StoppedError], tuple[int]]:
        """Pickled by its number, to travel between ranks."""
        return StoppedError, (self.signal_number,)


def signal_name(number: int) -> str:
    """`SIGTERM` for 15; `signal 0` for a number without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def first_line(error: BaseException) -> str:
    """The first line of a library's error, at most 400 characters; some are pages long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]


def counted(number: int, thing: str, ending: str = "s") -> str:
    """`1 row`, `2 rows`, `0 batches`."""
    return f"{number} {thing}{'' if number == 1 else ending}"


def type_named(value: object) -> str:
    """The type of `value` with its article: `a list`, `an int`."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"
