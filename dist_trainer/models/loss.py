"""Sums of token losses. B batch, T sequence, V vocabulary."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

IGNORED_TARGET = -100


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target) in nats over the targets that are not IGNORED_TARGET; float32 scalar.

    `logits` are [..., V] in any floating format, `targets` [...]; the softmax is taken in float32.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


def linear_cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int) -> Tensor:
    """cross_entropy_sum(hidden @ weight.T, targets), of at most `chunk_tokens` tokens' logits at a time.

    `hidden` is [N, D], `weight` [V, D], `targets` [N]. The logits of a chunk are computed anew in the backward pass, so
    that float32 logits of the whole batch never exist.
    """
    if hidden.shape[0] <= chunk_tokens:
        return cross_entropy_sum(F.linear(hidden, weight), targets)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for hidden_part, targets_part in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        total = total + torch.utils.checkpoint.checkpoint(
            _chunk_loss, hidden_part, weight, targets_part, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy_sum(F.linear(hidden, weight), targets)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Sum of the token losses of `batch` under `model`.

    A model whose forward takes `targets` sums its own loss; of any other the output is logits, or carries them as
    `.logits` (Hugging Face).
    """
    if takes_targets(model):
        return model(batch.tokens, batch.targets)
    output = model(batch.tokens)
    return cross_entropy_sum(getattr(output, "logits", output), batch.targets)


def takes_targets(model: nn.Module) -> bool:
    """Whether forward, beneath a data-parallel wrapper, has a parameter named `targets`."""
    inner = model.module if hasattr(model, "module") and isinstance(model.module, nn.Module) else model
    return _takes_targets(type(inner))


_KNOWN: dict[type, bool] = {}


def _takes_targets(kind: type[nn.Module]) -> bool:
    if kind not in _KNOWN:
        _KNOWN[kind] = "targets" in inspect.signature(kind.forward).parameters
    return _KNOWN[kind]
