"""What every tracker is told about its run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_trainer.config.schema import TrainingConfig

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class RunContext:
    """The run, as it stands when training begins or goes on."""

    config: TrainingConfig
    folder: Path
    """OUTPUT_DIR/RUN_NAME."""
    start_step: int
    """Finished optimizer steps: 0, or those of the checkpoint resumed from."""
    max_steps: int
    parameters: int
    """Trainable numbers in the model."""
    environment: dict[str, Any] = field(default_factory=dict)
    """What `describe_environment` found."""
    chats: bool = False
    """Whether it trains on conversations."""
