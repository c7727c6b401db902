"""The step of a hand-written training loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import workloads

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class BareLoop:
    """From sequences to updated weights, with nothing around it."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device, dtype: str, *, lean: bool) -> None:
        """`model` is DecoderLM, wrapped or not; `lean`: its own loss, which never holds all logits, not F.cross_entropy of
        float32 logits.
        """
        self.model, self.optimizer, self.device, self.lean = model, optimizer, device, lean
        self.parameters = list(model.parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if dtype in DTYPES:
            self.autocast = lambda: torch.autocast(device.type, dtype=DTYPES[dtype])

    def step(self, sequences: np.ndarray) -> Tensor:
        """Train on `sequences`, integers [B, T + 1]; returns the loss, a scalar."""
        ids = torch.from_numpy(sequences.astype("int64"))
        if self.device.type == "cuda":
            ids = ids.pin_memory()  # otherwise the copy would wait for all queued work
        ids = ids.to(self.device, non_blocking=True)
        tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        with self.autocast():
            if self.lean:
                loss = self.model(tokens, targets) / targets.numel()
            else:
                loss = F.cross_entropy(self.model(tokens).float().flatten(0, 1), targets.flatten())
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, workloads.MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss
