"""Times a contestant from inside, in the same way for all: with a hook after each optimizer step."""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from benchmarks.workloads import Workload

if TYPE_CHECKING:
    from benchmarks.in_turn import BareStepsInTurn

STARTED = "BENCHMARK_STARTED"
"""Variable with the time (unix seconds) at which the contestant's command was given."""
FOLDER = "BENCHMARK_WORKLOAD"
"""Variable with the workload's folder."""


class Stopwatch:
    """Laps of one process. On GPUs it synchronizes at the start and end of the timed steps, and not in between."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.laps: list[float] = []
        self.seconds_to_first_step = 0.0
        self.cpu = [0.0, 0.0]
        self.peak_bytes = 0
        self.in_turn: BareStepsInTurn | None = None

    def watch(self, optimizer: Optimizer) -> None:
        """Record the time after every step of `optimizer`."""
        optimizer.register_step_post_hook(lambda *_: self._lap())
        if self.workload.in_turn:
            # Imported here only: a contestant's imports count in its time to the first step.
            from benchmarks.in_turn import BareStepsInTurn

            in_turn = BareStepsInTurn(self.workload)
            optimizer.register_step_post_hook(lambda *_: in_turn.step())
            self.in_turn = in_turn

    def _lap(self) -> None:
        step = len(self.laps) + 1
        first, last = self.workload.warmup_steps, self.workload.total_steps
        if step in (1, first, last) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == 1:
            self.seconds_to_first_step = time.time() - float(os.environ[STARTED])
        if step in (first, last):
            self.cpu[step == last] = _cpu_seconds_of_session()
        if step == last:
            # Here, because not all contestants do the same after the last step: ours saves, for example.
            self.peak_bytes = _peak_bytes()
        self.laps.append(time.perf_counter())

    def result(self, loss: float | None) -> dict[str, Any]:
        """The measurements; `loss` is that of the last step, to check that all contestants do the same work."""
        workload = self.workload
        timed = self.laps[workload.warmup_steps - 1 :]
        assert len(timed) == workload.size.steps + 1, f"{len(self.laps)} steps, not {workload.total_steps}"
        steps = [later - earlier for earlier, later in itertools.pairwise(timed)]
        on_gpu = torch.cuda.is_available()
        # Laps on a GPU show when kernels were queued, not when they finished: there only the total time counts.
        seconds = (timed[-1] - timed[0]) / len(steps) if on_gpu else statistics.median(steps)
        return {
            "step_seconds": seconds,
            "cpu_seconds": (self.cpu[1] - self.cpu[0]) / len(steps),
            "peak_bytes": self.peak_bytes,
            "seconds_to_first_step": self.seconds_to_first_step,
            "stall_seconds": max(steps) - statistics.median(steps) if workload.save else None,
            "loss": loss,
            "in_turn": self.in_turn and self.in_turn.seconds[workload.warmup_steps :],
        }


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_seconds_of_session() -> float:
    """User and system time of all processes in this session, including helpers."""
    session, ticks = os.getsid(0), 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # has exited meanwhile
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def write_result(stopwatch: Stopwatch, loss: float | None) -> None:
    """Write the result where the comparison looks for it."""
    rank = int(os.environ.get("RANK", "0"))
    (stopwatch.workload.folder / f"result-{rank}.json").write_text(json.dumps(stopwatch.result(loss)))


def workload_here() -> Workload:
    """The workload that this process was started for."""
    return Workload.load(Path(os.environ[FOLDER]))
