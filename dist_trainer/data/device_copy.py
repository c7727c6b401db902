"""Batches on their way to the device while it still computes the step before."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from dist_trainer.data.batch import Batch


class DeviceCopy:
    """On GPUs copies run on a stream of their own, beside the kernels; on CPUs there is nothing to copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches on the device; not to be read before `wait`. Those that are pinned are copied without waiting."""
        if self._device.type == "cpu":
            return list(batches)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            return [batch.to(self._device) for batch in batches]

    def wait(self, batches: Sequence[Batch]) -> None:
        """Have the device, not the host, wait until these have arrived."""
        if self._stream is None:
            return
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for batch in batches:
            # Their memory came from the other stream's pool, and must not go back there before the step has read it.
            batch.record_stream(computing)
