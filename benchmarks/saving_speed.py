"""How long training pauses for a checkpoint, and how long loading takes, compared with torch.save and torch.load.

python -m benchmarks.saving_speed [--size 124m] [--rounds 5]

The same state (weights, and AdamW's two averages, in float32) is saved in turn by torch.save, by torch.save with the file
synced to disk, and by the checkpoint manager, whose stall is the time until `save` returns; the rest happens in the
background, with every file synced. Nothing else runs meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.contestants.model import adamw, build
from benchmarks.machine import machine_and_versions
from benchmarks.workloads import SIZES, Workload
from dist_trainer.checkpoint.manager import CheckpointManager
from dist_trainer.checkpoint.state import Progress, restore, take_snapshot
from dist_trainer.config.schema import CheckpointConfig
from dist_trainer.models.weights import load_weights, make_weight_saver
from dist_trainer.parallel.cpu.memory import keep_freed_memory

BASE = "torch.save"


class State:
    """A model after its first step."""

    def __init__(self, size: str, folder: Path) -> None:
        self.model = build(Workload(SIZES[size], folder), torch.device("cpu"))
        self.optimizer = adamw(self.model)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.folder = folder
        self.manager = CheckpointManager(
            folder / "checkpoints", CheckpointConfig(keep_last=1), save_model_fn=make_weight_saver(self.model)
        )
        self.step = 0

    def torch_save(self, *, synced: bool) -> None:
        with (self.folder / "state.pt").open("wb") as file:
            torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
            if synced:
                file.flush()
                os.fsync(file.fileno())

    def save(self) -> None:
        self.step += 1

        def take():
            progress = Progress(step=self.step)
            return take_snapshot(self.model, self.optimizer, scaler={}, progress=progress, metadata={})

        self.manager.save(take, is_best=False, before_publish=lambda: None)

    def torch_load(self) -> None:
        found = torch.load(self.folder / "state.pt", weights_only=True)
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])

    def load(self) -> None:
        newest = (self.folder / "checkpoints" / "latest").resolve()
        restore(newest, self.model, self.optimizer, load_weights=load_weights, load_scaler=lambda state: None)


def seconds(act: Callable[[], None]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def measure(state: State, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}

    def note(name: str, took: float) -> None:
        found.setdefault(name, []).append(took)

    for number in range(rounds + 1):  # the first is not counted
        if number == 1:
            found.clear()
        note(BASE, seconds(lambda: state.torch_save(synced=False)))
        note("torch.save, synced", seconds(lambda: state.torch_save(synced=True)))
        begin = time.perf_counter()
        note("ours: training stands still", seconds(state.save))
        state.manager.wait()
        note("ours: until it is durable", time.perf_counter() - begin)
        note("torch.load", seconds(state.torch_load))
        note("ours: load, digests compared", seconds(state.load))
    return found


def table(found: dict[str, list[float]]) -> str:
    lines = ["| | of torch.save's time, median (min to max) | seconds |", "|---|---|---|"]
    for name, times in found.items():
        ratios = [own / base for own, base in zip(times, found[BASE], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        lines.append(f"| {name} | {spread} | {statistics.median(times):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="124m")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()  # as in a run on a CPU
    folder = Path(tempfile.mkdtemp(prefix="dist-trainer-saving-"))
    try:
        found = measure(State(arguments.size, folder), arguments.rounds)
    finally:
        shutil.rmtree(folder)
    print(f"{machine_and_versions()}\nSize {arguments.size}, {arguments.rounds} rounds.\n\n{table(found)}")


if __name__ == "__main__":
    main()
