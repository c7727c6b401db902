"""Folders of runs as training leaves them, for what reads such folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from dist_trainer.config.loading import as_dict
from dist_trainer.config.schema import TrackingConfig, TrainingConfig
from dist_trainer.tracking.jsonl import encode_line
from dist_trainer.tracking.status import append_event
from dist_trainer.tracking.tracker import RunContext


def run_context(
    folder: Path, *, start_step: int = 0, environment: dict[str, Any] | None = None, wandb: Any = "disabled", **tracking: Any
) -> RunContext:
    """A run of 20 steps with the default config, but for its section `tracking`."""
    section = TrackingConfig(wandb=wandb, **tracking)
    config = as_dict(TrainingConfig(tracking=section))
    return RunContext(
        "default", folder, section, config, start_step, max_steps=20, parameters=1000, environment=environment or {}
    )


def train_line(step: int, loss: float = 3.0) -> dict[str, Any]:
    numbers = {"lr": 0.1 + 0.2, "grad_norm": 1.0, "tokens": step * 10, "tokens_per_second": 5.0, "mfu": None}
    timing = {"step_seconds": 0.5, "data_seconds": 0.1, "peak_memory_bytes": 1 << 20, "time": 1e9 + step, "epoch": 0.5}
    return {"kind": "train", "step": step, "loss": loss, **numbers, **timing, "skipped": not math.isfinite(loss)}


def validation_line(step: int, loss: float = 2.0) -> dict[str, Any]:
    metadata = {"perplexity": math.exp(loss), "tokens": 7, "seconds": 0.25, "best": True, "time": 1e9 + step}
    return {"kind": "validation", "step": step, "loss": loss, **metadata}


def sample_line(step: int, text: str) -> dict[str, Any]:
    return {"kind": "sample", "step": step, "prompt": "It was", "text": text, "seconds": 0.125, "time": 1e9 + step}


def steps_of(folder: Path) -> list[int]:
    """Steps of all lines of a run, in order."""
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines)))


def write_run(folder: Path, *, learning_rate: float = 1e-3, steps: int = 40, spike_at: int | None = None) -> Path:
    """A run that was stopped by SIGTERM, killed later, and finished; two of its losses are not finite, and that of step
    `spike_at` is 45.
    """
    losses = {step: 4 + 20 * math.exp(-step) + 0.1 * math.sin(step) for step in range(1, steps + 1)}
    losses |= {17: math.nan, 18: math.nan} | ({} if spike_at is None else {spike_at: 45.0})
    lines: list[dict[str, Any]] = []
    for step, loss in losses.items():
        lines.append(train_line(step, loss) | {"lr": learning_rate * step / steps})
        if step % 10 == 0:
            lines += [validation_line(step, 4 + 1 / step), sample_line(step, f" {step} <script>alert(1)</script>")]
    for line in lines:
        line["time"] += 2 * (line["step"] > 15) + 3 * (line["step"] > 25)
    write_metrics(folder, lines)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"torn')
    for event, step, time, metadata in (
        ("start", 0, 0.0, {"began": 1e9 - 3}),
        ("preempted", 15, 15.5, {"reason": "SIGTERM"}),
        ("resume", 15, 16.5, {"began": 1e9 + 16, "lost_steps": 0}),
        ("resume", 25, 30.0, {"began": 1e9 + 29.5, "lost_steps": 2}),
        ("finished", steps, steps + 6.0, {"reason": None}),
    ):
        if event in ("start", "resume"):
            command = "python -m dist_trainer.train --seed 1"
            metadata |= {"environment": {"host": "<b>", "device": "CPU", "command": command}, "parameters": 1_234_567}
        append_event(folder, event, step=step, time=1e9 + time, **metadata)
    config = as_dict(TrainingConfig(run_name=folder.name))
    config["optim"]["learning_rate"] = learning_rate
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    status = {"state": "finished", "step": steps, "max_steps": steps, "reason": None}
    (folder / "status.json").write_text(json.dumps(status))
    return folder
