"""`Batch`: what loaders yield and models learn from. B batch, T sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED_TARGET = -100
"""Target of a position that carries no loss (padding, prompts), as in torch and Hugging Face."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what should follow each of them."""

    tokens: Tensor
    """int64, B x T."""
    targets: Tensor
    """int64, B x T: the token that follows, or IGNORED_TARGET."""

    def num_targets(self) -> int:
        """Positions that carry a loss; call it while the batch is in host memory, where counting waits for nothing."""
        return int(np.count_nonzero(self.targets.numpy() != IGNORED_TARGET))

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, copied without waiting where its memory is pinned."""
        return Batch(self.tokens.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (torch's DataLoader calls this)."""
        return Batch(self.tokens.pin_memory(), self.targets.pin_memory())
