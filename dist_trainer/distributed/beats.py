"""What ranks tell one another of themselves, and what follows from it: which rank the run cannot continue without."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

FIRST_STEP_MINUTES, LATER_MINUTES = 10.0, 2.0
"""distributed.hang_timeout_minutes where it is null: until a process's first step is done (it may compile), and later."""
STEPS_OF_PATIENCE = 10.0
"""Times the longest step so far: a rank may go without progress for so long, if that is more than the timeout."""

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
"""What the main thread is at. `backward`: in the last backward pass of a step, which exchanges gradients."""
UNLIMITED: frozenset[Phase] = frozenset({"preparing", "saving", "in a callback"})
"""These may take hours, as long as the process shows signs of life."""
WAITING: frozenset[Phase] = frozenset({"waiting for others", "backward", "updating", "logging", "summing losses"})
"""In these a rank without progress is not to blame: it may be waiting for one that is behind."""
STEPPING: frozenset[Phase] = frozenset({"reading data", "training", "backward", "updating", "logging"})
"""What a step's time is spent in, apart from waiting for others before it."""


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself."""

    step: int = 0
    """Finished steps."""
    phase: Phase = "preparing"
    idle_seconds: float = 0.0
    """Since it last made progress: came to the phase, or did another micro-batch or batch in it."""
    patience_seconds: float = 60 * FIRST_STEP_MINUTES
    """How long others are to bear its silence, and at least how long it may go without progress in a limited phase."""
    longest_step_seconds: float = 0.0
    """Of its steps so far, without the first one, which may compile, once there is a second."""
    gone: tuple[int, ...] = ()
    """Ranks that it knows to have died."""
    number: int = 0
    """Of the beat: equal numbers are silence."""

    @property
    def lacks_progress(self) -> bool:
        """Whether it has been without progress for longer than a healthy rank is."""
        patience = max(self.patience_seconds, STEPS_OF_PATIENCE * self.longest_step_seconds)
        return self.phase not in UNLIMITED and self.idle_seconds > patience

    @property
    def waits(self) -> int:
        """0: for nobody; 1: perhaps, in a collective; 2: for what others have still to do."""
        return (self.phase in WAITING) + (self.phase == "waiting for others")


@dataclass(frozen=True)
class Finding:
    """A rank without which the run cannot go on."""

    rank: int
    trouble: str
    """`is gone`, `hangs: no sign of life for 120 s`, ..."""
    beat: Beat
    """The last one of it."""

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended."""
        return self.trouble == IS_GONE


IS_GONE = "is gone"


def judge(beats: Sequence[Beat], silent_seconds: Sequence[float]) -> list[Finding]:
    """The ranks that the run cannot go on with: dead, silent, or without progress, by their last beats and their ages.

    Where one makes no progress none does, as the others wait for it: to blame are those that do not wait, or else those that
    are still in a collective when others are past it. Nobody is where all are in the same phase of the same step: none is
    behind another, so they are slow, or a collective of theirs never completes, which then ends by its own timeout. But if all
    wait for one another, none can be slow.
    """
    if gone := sorted({rank for beat in beats for rank in beat.gone}):
        return [Finding(rank, IS_GONE, beats[rank]) for rank in gone]
    if silent := silent_ranks(zip(range(len(beats)), beats, silent_seconds, strict=True)):
        return silent
    together = len({(beat.step, beat.phase) for beat in beats}) == 1 and beats[0].phase != "waiting for others"
    if together or not all(beat.lacks_progress for beat in beats):
        return []
    behind = min(beat.waits for beat in beats)
    return [
        Finding(rank, f"hangs: no progress for {beat.idle_seconds:.0f} s", beat)
        for rank, beat in enumerate(beats)
        if beat.waits == behind
    ]


def silent_ranks(ranks: Iterable[tuple[int, Beat, float]]) -> list[Finding]:
    """Those of (rank, last beat, seconds since it) that have been silent for longer than they asked to bear."""
    return [
        Finding(rank, f"hangs: no sign of life for {seconds:.0f} s", beat)
        for rank, beat, seconds in ranks
        if seconds > beat.patience_seconds
    ]


def encode_beat(beat: Beat) -> str:
    """As JSON."""
    return json.dumps(asdict(beat))


def decode_beat(told: bytes | str | dict[str, Any]) -> Beat:
    """From JSON, or what was made of it."""
    fields: dict[str, Any] = told if isinstance(told, dict) else json.loads(told)
    fields["gone"] = tuple(fields["gone"])
    return Beat(**fields)
