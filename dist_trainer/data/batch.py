"""`Batch`: what loaders yield and models train on, and how batches get to the device. B batch, T sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED_TARGET = -100
"""Target of a position that is not trained on (padding, prompts), as in torch and Hugging Face."""


@dataclass(frozen=True)
class Batch:
    """Sequences of tokens, and the token that follows each of them."""

    input_ids: Any
    """int64, B x T. From a user's own dataset any inputs: a tensor, or tensors in dictionaries and lists, B first."""
    targets: Tensor
    """int64, B x T: the token that follows, or IGNORED_TARGET. From a user's own dataset of any shape, B first."""

    document_ids: Tensor | None = None
    """int32, B x T: the number of each token's document in its sequence, ascending, if documents must not attend to each
    other; None: attention over the complete sequence."""

    counted_targets: int | None = field(default=None, init=False, repr=False, compare=False)
    """The result of `num_targets`, if `split` has already counted; batches derived from this one count again."""

    def num_targets(self) -> int:
        """Positions that are trained on. Call it while the batch is in host memory, where counting does not wait for a GPU."""
        if self.counted_targets is not None:
            return self.counted_targets
        return int(np.count_nonzero(self.targets.numpy() != IGNORED_TARGET))

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, copied asynchronously if its memory is pinned."""
        return self._map(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (torch's DataLoader calls this)."""
        return self._map(Tensor.pin_memory)

    def shortened(self, by: int) -> Batch:
        """The sequences, without their last `by` positions."""
        return self if by == 0 else self._map(lambda part: part[:, : part.shape[1] - by].contiguous())

    def widened(self, length: int) -> Batch:
        """Sequences of `length` positions, each repeated from its beginning to fill them."""
        repeats = -(-length // self.input_ids.shape[1])
        return self if repeats == 1 else self._map(lambda part: part.repeat(1, repeats)[:, :length].contiguous())

    def first_sequences(self, count: int) -> Batch:
        """The first `count` sequences."""
        return self._map(lambda part: part[:count])

    def split(self, count: int) -> list[Batch]:
        """Batches of `count` sequences each (the last one may be smaller), with their targets counted.

        All are made at once: for a small model, one call per batch would take longer than the step's computation.
        """
        input_ids, targets = self.input_ids.split(count), self.targets.split(count)
        document_ids = [None] * len(input_ids) if self.document_ids is None else self.document_ids.split(count)
        counts = np.count_nonzero(self.targets.numpy() != IGNORED_TARGET, axis=1)
        sums = np.add.reduceat(counts, np.arange(0, len(counts), count)).tolist()
        batches = [Batch(*parts) for parts in zip(input_ids, targets, document_ids, strict=True)]
        for batch, counted in zip(batches, sums, strict=True):
            object.__setattr__(batch, "counted_targets", counted)  # no argument: `replace(batch, targets=...)` would keep it
        return batches

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the batch's memory until `stream` has finished its work so far, even if the batch is released earlier."""

        def record(part: Tensor) -> Tensor:
            part.record_stream(stream)
            return part

        self._map(record)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        document_ids = None if self.document_ids is None else function(self.document_ids)
        return Batch(_map_tensors(self.input_ids, function), function(self.targets), document_ids)


def _map_tensors(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: _map_tensors(part, function) for name, part in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [_map_tensors(part, function) for part in inputs]
    return inputs


class DeviceCopy:
    """Copies batches to a GPU on a separate stream, while the device computes. On CPUs there is nothing to copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches on the device, not to be read before `wait`. Pinned ones are copied asynchronously."""
        if self._device.type == "cpu":
            return list(batches)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            return [batch.to(self._device) for batch in batches]

    def wait(self, batches: Sequence[Batch]) -> None:
        """Make the device, not the host, wait until these batches are copied."""
        if self._stream is None:
            return
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for batch in batches:
            # Their memory belongs to the copy stream's pool, and must not return there before the step has read it.
            batch.record_stream(computing)
