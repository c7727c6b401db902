"""Tokens per second, model FLOPs utilisation (MFU), peak memory: measured over the steps only."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable

import torch

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.distributed.machine import device_name

_T = 1e12

PEAK_FLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA, data centre
    (r"GB300", {"bf16": 2500 * _T, "fp16": 2500 * _T}),
    (r"GB200", {"bf16": 2500 * _T, "fp16": 2500 * _T}),
    (r"B300", {"bf16": 2250 * _T, "fp16": 2250 * _T}),
    (r"B200", {"bf16": 2250 * _T, "fp16": 2250 * _T}),
    (r"H200 NVL", {"bf16": 835.5 * _T, "fp16": 835.5 * _T}),
    (r"(H200|GH200)", {"bf16": 989.4 * _T, "fp16": 989.4 * _T}),
    (r"H100 NVL", {"bf16": 835.5 * _T, "fp16": 835.5 * _T}),
    (r"(H100|H800) PCIe", {"bf16": 756 * _T, "fp16": 756 * _T}),
    (r"(H100|H800)", {"bf16": 989.4 * _T, "fp16": 989.4 * _T}),
    (r"H20", {"bf16": 148 * _T, "fp16": 148 * _T}),
    (r"(A100|A800)", {"bf16": 312 * _T, "fp16": 312 * _T}),
    (r"A40", {"bf16": 149.7 * _T, "fp16": 149.7 * _T}),
    (r"A30", {"bf16": 165 * _T, "fp16": 165 * _T}),
    (r"A10G", {"bf16": 70 * _T, "fp16": 70 * _T}),
    (r"A10", {"bf16": 125 * _T, "fp16": 125 * _T}),
    (r"L40S", {"bf16": 362 * _T, "fp16": 362 * _T}),
    (r"L40", {"bf16": 181 * _T, "fp16": 181 * _T}),
    (r"L4", {"bf16": 121 * _T, "fp16": 121 * _T}),
    (r"V100S", {"fp16": 130 * _T}),
    (r"V100-PCIE", {"fp16": 112 * _T}),
    (r"V100", {"fp16": 125 * _T}),
    (r"T4", {"fp16": 65 * _T}),
    # NVIDIA, workstation and desktop: with fp32 accumulation, as training needs it
    (r"RTX 6000 Ada", {"bf16": 364.2 * _T, "fp16": 364.2 * _T}),
    (r"RTX A6000", {"bf16": 154.8 * _T, "fp16": 154.8 * _T}),
    (r"RTX 5090(?! D)", {"bf16": 209.5 * _T, "fp16": 209.5 * _T}),
    (r"RTX 4090(?! D)", {"bf16": 165.2 * _T, "fp16": 165.2 * _T}),
    (r"RTX 3090(?! Ti)", {"bf16": 71.2 * _T, "fp16": 71.2 * _T}),
    # AMD; torch sees each half of an MI250 or MI250X as a separate device
    (r"MI355X", {"bf16": 2516.6 * _T, "fp16": 2516.6 * _T}),
    (r"MI350X", {"bf16": 2306.9 * _T, "fp16": 2306.9 * _T}),
    (r"(MI300X|MI325X)", {"bf16": 1307.4 * _T, "fp16": 1307.4 * _T}),
    (r"MI300A", {"bf16": 980.6 * _T, "fp16": 980.6 * _T}),
    (r"MI250X", {"bf16": 191.5 * _T, "fp16": 191.5 * _T}),
    (r"MI250", {"bf16": 181 * _T, "fp16": 181 * _T}),
    (r"MI210", {"bf16": 181 * _T, "fp16": 181 * _T}),
)
"""Part of a device's name → its peak FLOP/s by number format, without sparsity; the first match counts.

From the manufacturers' data sheets; figures given with sparsity are halved. A power limit below the data sheet's lowers what
can be reached, but not these figures. Turing and Volta have no bf16 units, hence no bf16 entry.
"""


def peak_flops(name: str, dtype: str) -> float | None:
    """Peak FLOP/s of the device called `name` in `dtype` (fp32, bf16, fp16); None if it is unknown, and for fp32.

    The peak of fp32 depends on whether TF32 is allowed, so none is given. Nor is one given for a part of a GPU (MIG) or a
    laptop's, whose names contain that of the full GPU.
    """
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", name):
        return None
    for part, peaks in PEAK_FLOPS:
        if re.search(rf"\b{part}\b", name, re.IGNORECASE):
            return peaks.get(dtype)
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: tensors on a GPU, the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts it in KiB


class Stopwatch:
    """Adds up the seconds spent inside and counts the uses; cannot be nested. A generator-based one would be slower."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.is_open = False
        self._clock = clock
        self._began = 0.0
        self.clear()

    def clear(self) -> None:
        """Reset to zero."""
        self.seconds, self.count = 0.0, 0

    def __enter__(self) -> None:
        self.is_open = True
        self._began = self._clock()

    def __exit__(self, *_: object) -> None:
        self.seconds += self._clock() - self._began
        self.count += 1
        self.is_open = False


class Throughput:
    """Measures from one logged step to the next, without validation and saving."""

    def __init__(
        self,
        world: DistributedContext,
        *,
        dtype: str,
        flops_per_token: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`dtype`: of the matrix products. `flops_per_token`: forward and backward together."""
        self._device = world.device
        peak = peak_flops(device_name(world.device), dtype) if world.device.type == "cuda" else None
        self._peak_tokens_per_second = peak * world.world_size / flops_per_token if peak and flops_per_token else None
        """The rate at which every device would be at its peak FLOP/s."""
        self._clock = clock
        self.paused = Stopwatch(clock)
        """Time inside is not part of the steps."""
        self.waiting_for_data = Stopwatch(clock)
        """Time inside is part of the steps, and also counted in `data_seconds`."""
        self.saving = Stopwatch(clock)
        """Time inside is spent waiting for a checkpoint, and counted in `checkpoint_stall_ms`."""
        self.start(step=0, tokens=0)

    def start(self, *, step: int, tokens: int) -> None:
        """Start measuring after `step` steps and `tokens` target tokens."""
        self._step, self._tokens = step, tokens
        for stopwatch in (self.paused, self.waiting_for_data, self.saving):
            stopwatch.clear()
        self._started = self._clock()

    def measure(self, *, step: int, tokens: int) -> dict[str, float | int | None]:
        """Rates over all ranks since the last call, given the steps and target tokens so far; starts the next measurement.

        `tokens_per_second` counts target tokens. `mfu` = tokens_per_second * flops_per_token / (ranks * peak FLOP/s): the share
        of the devices' peak that the model's own arithmetic uses; recomputation and padding do not count.
        `checkpoint_stall_ms` is how long training waited for checkpoints; None: there was none.
        """
        seconds = self._clock() - self._started - self.paused.seconds
        steps = max(1, step - self._step)
        tokens_per_second = (tokens - self._tokens) / seconds if seconds > 0 else 0.0
        measured = {
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second / self._peak_tokens_per_second if self._peak_tokens_per_second else None,
            "step_seconds": seconds / steps,
            "data_seconds": self.waiting_for_data.seconds / steps,
            "checkpoint_stall_ms": 1000 * self.saving.seconds if self.saving.count else None,
            "peak_memory_bytes": peak_memory_bytes(self._device),
        }
        self.start(step=step, tokens=tokens)
        return measured
