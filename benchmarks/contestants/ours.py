"""`python -m dist_trainer.train`, as users run it; arguments are passed on. Only the optimizer has a stopwatch."""

from __future__ import annotations

import json
import sys

from torch import nn
from torch.optim import Optimizer

from benchmarks.stopwatch import Stopwatch, workload_here, write_result
from benchmarks.workloads import Workload
from dist_trainer.config.schema import OptimConfig
from dist_trainer.optim.registry import adamw
from dist_trainer.train import main as train

STOPWATCHES: list[Stopwatch] = []


def timed_adamw(config: OptimConfig, model: nn.Module) -> Optimizer:
    """The entry that the workload's config names."""
    optimizer = adamw(config, model)
    STOPWATCHES.append(Stopwatch(workload_here()))
    STOPWATCHES[-1].watch(optimizer)
    return optimizer


def last_loss(workload: Workload) -> float | None:
    lines = (workload.folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"][-1]


def main() -> int:
    workload = workload_here()
    code = train(
        ["--config", str(workload.folder / "config.yaml"), "--output_dir", str(workload.folder / "runs"), *sys.argv[1:]]
    )
    # Under its own name, not __main__, because the trainer looked up the optimizer there.
    from benchmarks.contestants.ours import STOPWATCHES

    write_result(STOPWATCHES[-1], last_loss(workload))
    return code


if __name__ == "__main__":
    sys.exit(main())
