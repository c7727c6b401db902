"""Sums of token losses. B batch, T sequence, V vocabulary."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from dist_trainer.errors import ConfigError

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
    `.logits` (Hugging Face). Raises ConfigError where the batch's documents are to be kept apart and the model cannot.
    """
    apart = {}
    if getattr(batch, "documents", None) is not None:
        refuse_model_without_documents(model)
        apart["documents"] = batch.documents
    if takes(model, "targets"):
        return model(batch.tokens, batch.targets, **apart)
    output = model(batch.tokens, **apart)
    return cross_entropy_sum(getattr(output, "logits", output), batch.targets)


def refuse_model_without_documents(model: nn.Module) -> None:
    """Raises ConfigError where `model` cannot keep the documents of a row apart."""
    if not takes(model, "documents"):
        raise ConfigError(
            f"data.document_mask: is true, but the forward of {type(_inner(model)).__name__} takes no `documents` by which to "
            "keep them apart; set it to false, or data.packing to false for one document a row"
        )


def takes(model: nn.Module, parameter: str) -> bool:
    """Whether forward, beneath a data-parallel wrapper, has a parameter of that name."""
    return parameter in _parameters(type(_inner(model)))


def _inner(model: nn.Module) -> nn.Module:
    return model.module if hasattr(model, "module") and isinstance(model.module, nn.Module) else model


_KNOWN: dict[type, frozenset[str]] = {}


def _parameters(kind: type[nn.Module]) -> frozenset[str]:
    if kind not in _KNOWN:
        _KNOWN[kind] = frozenset(inspect.signature(kind.forward).parameters)
    return _KNOWN[kind]
