"""How training ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_trainer.checkpoint.state import Progress


@dataclass(frozen=True)
class TrainingResult:
    """How a call of `Trainer.fit` ended."""

    state: Literal["finished", "preempted"]
    progress: Progress
    signal_number: int = 0
    """The largest signal number that any rank received; 0: none."""
