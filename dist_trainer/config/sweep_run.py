"""A run that `wandb agent` started: one of many with the same command line but for what the sweep varies."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from dist_trainer.config.schema import TrainingConfig


def in_folder_of_its_own(config: TrainingConfig, environment: Mapping[str, str] = os.environ) -> TrainingConfig:
    """`config` with the W&B id of the sweep's run at the end of run_name; itself where no sweep started this process.

    With one run_name for all, the sweep's second run would find the folder of the first, and be refused as another run. W&B
    gives a run that was preempted the same id again: it finds its folder, and goes on.
    """
    run_id = environment.get("WANDB_RUN_ID", "")
    if not environment.get("WANDB_SWEEP_ID") or not run_id or config.run_name.endswith(f"-{run_id}"):
        return config
    return dataclasses.replace(config, run_name=f"{config.run_name}-{run_id}")
