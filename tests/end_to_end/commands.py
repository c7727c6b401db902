"""Runs real commands, as a user would type them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS_OF_A_COMMAND = 500.0
"""After this one hangs, however busy the machine."""
SMALL = [
    *("--config", str(ROOT / "configs" / "debug.yaml")),
    *("--tracking.wandb", "disabled"),
]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WANDB_"))}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def command(*words: str, module: str = "dist_trainer.train", **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m module words`; stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=options.pop("timeout", SECONDS_OF_A_COMMAND),
        cwd=options.pop("cwd", ROOT),
        env=environment(**options),
    )


def torchrun(ranks: int, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    launcher = ["--standalone", f"--nproc_per_node={ranks}", "-m", "dist_trainer.train"]
    return command(*launcher, *words, module="torch.distributed.run", **options)


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())
