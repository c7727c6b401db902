"""What the follower hands lines to, and what its sinks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

NOT_METRICS = {"kind", "step", "time", "non_finite", "prompt", "text"}

SECONDS_ALONE = 60.0
"""How long a follower may go on once training was killed, and nobody waits for it any more."""

Say = Callable[..., None]
"""Says something in the trainer's log: a text, and its level (default: INFO)."""


class Sink(Protocol):
    """One run in one place outside of its metrics.jsonl."""

    def take(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl. At each start of the run all lines are given anew, from the first on: it is for the sink
        to see that no step stands there twice."""

    def finish(self, state: str) -> None:
        """The run ended: finished, preempted, failed, or killed."""

    def goodbye(self) -> str:
        """For the log, after `finish`: where everything is now."""


def metrics_of(line: dict[str, Any]) -> dict[str, Any]:
    """What a line says in numbers, named `train/loss` and the like; what is unknown (null) is left out."""
    non_finite = line.get("non_finite")
    values = {**line, **(non_finite if isinstance(non_finite, dict) else {})}
    return {
        f"{line['kind']}/{name}": _as_number(value)
        for name, value in values.items()
        if name not in NOT_METRICS and value is not None
    }


def _as_number(value: Any) -> Any:
    """Booleans as 0 and 1, the names of non-finite numbers as these; all else as it is."""
    if isinstance(value, bool):
        return int(value)
    return float(value) if value in ("nan", "inf", "-inf") else value


def in_one_line(error: BaseException) -> str:
    """What went wrong, for the log."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) < 200 else f"{words[:200]}..."
