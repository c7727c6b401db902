"""Beats, the status reports of ranks, and which ranks have failed according to the last beat of each. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

FIRST_STEP_MINUTES, LATER_MINUTES = 10.0, 2.0
"""What null means for distributed.hang_timeout_minutes: until a process's first step is done (it may compile), and later."""
STEPS_OF_PATIENCE = 10.0
"""A rank may make no progress for this many times its longest step so far, if that is more than the timeout."""

Phase = Literal[
    "preparing",
    "warming up",
    "reading data",
    "waiting for others",
    "training",
    "backward",
    "updating",
    "logging",
    "validating",
    "summing losses",
    "sampling",
    "in a callback",
    "saving",
]
"""What the main thread is doing. `backward`: the last backward pass of a step, which exchanges gradients."""
UNLIMITED: frozenset[Phase] = frozenset({"preparing", "saving", "in a callback"})
"""These phases may take hours, as long as the process sends beats."""
WAITING: frozenset[Phase] = frozenset({"waiting for others", "backward", "updating", "logging", "summing losses"})
"""In these phases, a rank without progress may be waiting for another one."""
STEPPING: frozenset[Phase] = frozenset({"reading data", "training", "backward", "updating", "logging"})
"""The phases of a step, apart from waiting for others before it."""


@dataclass(frozen=True)
class Beat:
    """What a rank reports about itself."""

    step: int = 0
    """Finished steps."""
    phase: Phase = "preparing"
    idle_seconds: float = 0.0
    """Seconds since it last made progress: entered the phase, or finished another micro-batch or batch in it."""
    patience_seconds: float = 60 * FIRST_STEP_MINUTES
    """It has failed after this long without a beat; in a limited phase it may also make no progress for at least this long."""
    longest_step_seconds: float = 0.0
    """Its longest step so far; once there is a second step, without the first one, which may compile."""
    gone: tuple[int, ...] = ()
    """Ranks it knows to be dead."""
    number: int = 0
    """Number of the beat: if it does not change, the rank is silent."""

    @property
    def lacks_progress(self) -> bool:
        """Whether it has made no progress for longer than a healthy rank would."""
        patience = max(self.patience_seconds, STEPS_OF_PATIENCE * self.longest_step_seconds)
        return self.phase not in UNLIMITED and self.idle_seconds > patience

    @property
    def waits(self) -> int:
        """0: it is not waiting; 1: possibly, in a collective; 2: it is waiting for other ranks."""
        return (self.phase in WAITING) + (self.phase == "waiting for others")


@dataclass(frozen=True)
class FailedRank:
    """A rank that has failed, so that the run cannot continue."""

    rank: int
    reason: str
    """`is gone`, `stopped responding for 120 s`, `made no progress for 120 s`."""
    beat: Beat
    """The last one received from it."""

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended; otherwise it hangs."""
        return self.reason == IS_GONE


IS_GONE = "is gone"


def find_failed_ranks(beats: Sequence[Beat], silent_seconds: Sequence[float]) -> list[FailedRank]:
    """The ranks that are dead, silent or without progress, given the last beat of each and its age.

    If one rank makes no progress, none does, since the others wait for it. The ranks that are not waiting have failed; if all
    are waiting, those still in a collective that others have left. If all are in the same phase of the same step, none has
    failed: either they are slow, or their collective never completes, and its own timeout ends it. The exception is "waiting
    for others": if all are in that phase, they are not just slow.
    """
    if gone := sorted({rank for beat in beats for rank in beat.gone}):
        return [FailedRank(rank, IS_GONE, beats[rank]) for rank in gone]
    if silent := find_silent_ranks(zip(range(len(beats)), beats, silent_seconds, strict=True)):
        return silent
    together = len({(beat.step, beat.phase) for beat in beats}) == 1 and beats[0].phase != "waiting for others"
    if together or not all(beat.lacks_progress for beat in beats):
        return []
    last = min(beat.waits for beat in beats)
    return [
        FailedRank(rank, f"made no progress for {beat.idle_seconds:.0f} s", beat)
        for rank, beat in enumerate(beats)
        if beat.waits == last
    ]


def find_silent_ranks(ranks: Iterable[tuple[int, Beat, float]]) -> list[FailedRank]:
    """Of these (rank, last beat, seconds since it), the ranks that have been silent for longer than their patience_seconds."""
    return [
        FailedRank(rank, f"stopped responding for {seconds:.0f} s", beat)
        for rank, beat, seconds in ranks
        if seconds > beat.patience_seconds
    ]


def encode_beat(beat: Beat) -> str:
    """As JSON."""
    return json.dumps(asdict(beat))


def decode_beat(beat: bytes | str | dict[str, Any]) -> Beat:
    """From JSON, or from the dictionary in it."""
    fields: dict[str, Any] = beat if isinstance(beat, dict) else json.loads(beat)
    fields["gone"] = tuple(fields["gone"])
    return Beat(**fields)


def encode_failed_ranks(failed: Sequence[FailedRank]) -> str:
    """As JSON."""
    return json.dumps([asdict(rank) for rank in failed])


def decode_failed_ranks(text: bytes | str) -> list[FailedRank]:
    """From JSON."""
    return [FailedRank(fields["rank"], fields["reason"], decode_beat(fields["beat"])) for fields in json.loads(text)]
