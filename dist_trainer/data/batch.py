"""`Batch`: what loaders yield and models learn from. B batch, T sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED_TARGET = -100
"""Target of a position that carries no loss (padding, prompts), as in torch and Hugging Face."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what should follow each of them."""

    input_ids: Any
    """int64, B x T. From a data set of your own any inputs: a tensor, or tensors in dictionaries and lists, B first."""
    targets: Tensor
    """int64, B x T: the token that follows, or IGNORED_TARGET. From a data set of your own of any shape, B first."""

    document_ids: Tensor | None = None
    """int32, B x T: the number of each token's document within its row, ascending, where documents must not attend to each
    other; None: a row is one whole."""

    counted_targets: int | None = field(default=None, init=False, repr=False, compare=False)
    """What `num_targets` tells, where `split` has counted it; of what is made of this batch it is counted anew."""

    def num_targets(self) -> int:
        """Positions that carry a loss; call it while the batch is in host memory, where counting waits for nothing."""
        if self.counted_targets is not None:
            return self.counted_targets
        return int(np.count_nonzero(self.targets.numpy() != IGNORED_TARGET))

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, copied without waiting where its memory is pinned."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (torch's DataLoader calls this)."""
        return self._each(Tensor.pin_memory)

    def shortened(self, by: int) -> Batch:
        """The same rows without their last `by` positions."""
        return self if by == 0 else self._each(lambda part: part[:, : part.shape[1] - by].contiguous())

    def widened(self, length: int) -> Batch:
        """Rows of `length` positions, each repeated from its beginning to fill them."""
        repeats = -(-length // self.input_ids.shape[1])
        return self if repeats == 1 else self._each(lambda part: part.repeat(1, repeats)[:, :length].contiguous())

    def first_sequences(self, count: int) -> Batch:
        """The first `count` of its rows."""
        return self._each(lambda part: part[:count])

    def split(self, count: int) -> list[Batch]:
        """Batches of `count` of its rows each, the last one of what is left, and their targets counted: all at once, since
        each call costs a small model's step more than what it does.
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
        """Keep the memory of the batch until `stream` has done what it was told so far, even if it is let go of here."""

        def record(part: Tensor) -> Tensor:
            part.record_stream(stream)
            return part

        self._each(record)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        document_ids = None if self.document_ids is None else change(self.document_ids)
        return Batch(_each_tensor(self.input_ids, change), change(self.targets), document_ids)


def _each_tensor(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: _each_tensor(part, change) for name, part in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [_each_tensor(part, change) for part in inputs]
    return inputs


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
