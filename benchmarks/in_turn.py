"""Alternates steps of the bare loop with a contestant's steps."""

from __future__ import annotations

import time

import torch

from benchmarks.contestants.bare_loop import BareLoop
from benchmarks.contestants.model import adamw, build
from benchmarks.workloads import Workload


class BareStepsInTurn:
    """After each step of a contestant, makes one of the bare loop on its own model, in the same process, so that other load on
    the machine affects both alike. For one rank on a CPU.
    """

    def __init__(self, workload: Workload) -> None:
        device = torch.device("cpu")
        model = build(workload, device)
        self.loop = BareLoop(model, adamw(model), device, workload.dtype, lean=True)
        self.sequences = workload.sequences(rank=0)
        self.left = 0.0
        self.seconds: list[tuple[float, float]] = []
        """Of each pair of steps: the contestant's, the bare loop's."""

    def step(self) -> None:
        """Make the bare loop's step."""
        came = time.perf_counter()
        self.loop.step(self.sequences[len(self.seconds)])
        left = time.perf_counter()
        # The first one includes the start of the process; it is not timed.
        self.seconds.append((came - self.left, left - came))
        self.left = left
