"""A schedule for the jobs of these tests: `cosine`, but it dawdles or fails where the environment says so.

A job is named `--schedule.name tests.slurm.pace:cosine`, so this runs in every rank, once a step.
"""

from __future__ import annotations

import os
import time

from dist_trainer.optim import schedules

SECONDS = "1.0"
"""A slow step's, if SLOW_SECONDS does not say: so that a signal finds the run in its midst."""


def cosine(step: int, span: schedules.ScheduleSpec) -> float:
    first_life = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    if first_life and step >= int(os.environ.get("SLOW_FROM_STEP", span.total_steps)):
        time.sleep(float(os.environ.get("SLOW_SECONDS", SECONDS)))
    if (os.environ.get("RANK"), str(step)) == (os.environ.get("FAIL_RANK"), os.environ.get("FAIL_AT_STEP")):
        raise RuntimeError("failing on purpose")
    return schedules.cosine(step, span)
