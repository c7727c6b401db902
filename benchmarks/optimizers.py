"""Validation loss of the default run by tokens and by time for each optimizer, with its complete schedule.

    python -m benchmarks.optimizers                                      AdamW, the default run (Muon), and shorter Muon runs
    python -m benchmarks.optimizers adamw:0.01:350 muon:0.01:245         OPTIMIZER:LEARNING_RATE:STEPS, one after the other

A run of fewer steps is a separate run, not the start of a longer one: its learning rate has decayed at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine_and_versions

DEFAULT_RUNS = ("adamw:0.005:350", "muon:0.005:300", "muon:0.005:255")


@dataclass(frozen=True)
class Run:
    """One training of the default model on the default text."""

    optimizer: str
    learning_rate: float
    steps: int

    @classmethod
    def parse(cls, text: str) -> Run:
        try:
            optimizer, learning_rate, steps = text.split(":")
            return cls(optimizer, float(learning_rate), int(steps))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not OPTIMIZER:LEARNING_RATE:STEPS") from error


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    validation_loss: float
    tokens: int
    step_seconds: float
    """Of all steps together: without validation, samples and saving."""


def train(run: Run, folder: Path) -> Outcome:
    words = {
        "--run_name": "run",
        "--output_dir": str(folder),
        "--optim.name": run.optimizer,
        "--optim.learning_rate": str(run.learning_rate),
        "--train.max_steps": str(run.steps),
        "--validation.every_steps": "0",
        "--tracking.log_every_steps": "1",
        "--tracking.wandb": "disabled",
        "--checkpoint.resume": "never",
    }
    command = [sys.executable, "-m", "dist_trainer.train", *(word for pair in words.items() for word in pair)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]

    def of_kind(kind: str) -> list[dict[str, Any]]:
        return [line for line in lines if line["kind"] == kind]

    return Outcome(
        validation_loss=of_kind("validation")[-1]["loss"],
        tokens=of_kind("train")[-1]["tokens"],
        step_seconds=sum(line["step_seconds"] for line in of_kind("train")),
    )


def table(outcomes: dict[Run, Outcome]) -> str:
    first = next(iter(outcomes.values()))
    lines = ["| optimizer | learning rate | steps | tokens | time in steps | validation loss |", "|---|---|---|---|---|---|"]
    for run, came_to in outcomes.items():
        shares = f"{came_to.tokens / first.tokens:.2f} | {came_to.step_seconds / first.step_seconds:.2f}"
        lines.append(f"| {run.optimizer} | {run.learning_rate:g} | {run.steps} | {shares} | {came_to.validation_loss:.4f} |")
    return "\n".join(
        [*lines, "", f"Tokens and time as shares of the first run's, {first.tokens} tokens and {first.step_seconds:.0f} s."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Run.parse, metavar="RUN", help="OPTIMIZER:LEARNING_RATE:STEPS")
    runs = parser.parse_args().runs or [Run.parse(text) for text in DEFAULT_RUNS]
    outcomes: dict[Run, Outcome] = {}
    for run in runs:
        with tempfile.TemporaryDirectory(prefix="dist-trainer-bench-") as folder:
            outcomes[run] = train(run, Path(folder))
        print(f"{machine_and_versions()}\n\n{table(outcomes)}\n", flush=True)


if __name__ == "__main__":
    main()
