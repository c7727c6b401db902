"""Sums of token losses. B batch, T sequence, V vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_trainer.errors import ConfigError

IGNORED_TARGET = -100
"""Target that is not trained on, as in torch, Hugging Face and data/batch.py."""
FEW_LOGITS = 2**20
"""Up to this many logits (4 MiB in float32) are computed all at once, which is faster, by half if they are very few."""
CHUNK_LOGITS = 2**23
"""About this many logits (32 MiB in float32) are computed at once on a CPU, unless 256 tokens have more: a tenth faster than
2^21 with a vocabulary of 8192; 2^24 is no faster.
"""
CACHED_ROWS = 2048
"""Rows of a gradient [V, D] that are updated at once on a CPU; 6 MB if D is 768."""
FP16_SCALE = 2.0**15
"""Factor of softmax(logits) - onehot(targets) in float16, like GradScaler's of a loss. No entry exceeds 1, so none overflows,
and all down to 2^-29 keep their 11 bits; without the factor only those down to 2^-14 would."""
FP16_ROWS = 2**14
"""Rows of a gradient [V, D] whose float32 product exists at once on a GPU: 48 MiB if D is 768."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target) in nats over the targets that are not IGNORED_TARGET; float32 scalar.

    `logits` are [..., V] in any floating format, `targets` [...]; the softmax is taken in float32.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


class LogitLoss(nn.Module):
    """The loss of logits together with its gradient, which takes only one more subtraction.

    Without parameters; a module so that it can be one of a model's `compile_units`.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """cross_entropy_sum(logits, targets) of `logits` [N, V] and `targets` [N], and its gradient [N, V].

        The gradient is softmax(logits) - onehot(targets) in the logits' format, times FP16_SCALE in float16; rows of
        IGNORED_TARGET are meaningless.
        """
        counted = targets != IGNORED_TARGET
        index = targets.clamp(min=0).unsqueeze(1)
        log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        loss = -(log_probabilities.gather(1, index).squeeze(1) * counted).sum()
        if torch.compiler.is_compiling():
            # The comparison is fused with the rest; a scatter would write the probabilities to memory in float32.
            is_target = index == torch.arange(logits.shape[-1], device=logits.device)
            gradient = log_probabilities.exp() - is_target.float()
        else:
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
        if logits.dtype == torch.float16:
            gradient *= FP16_SCALE
        return loss, gradient.to(logits.dtype)


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, logit_loss: LogitLoss, chunk_tokens: int | None = None
) -> Tensor:
    """cross_entropy_sum(hidden @ weight.T, targets), of at most `chunk_tokens` tokens' logits at a time.

    `hidden` is [N, D], `weight` [V, D], `targets` [N]; the products are in autocast's format if it is enabled. The gradients of
    a chunk are computed together with its loss, so that nothing is computed twice and the logits of the full batch never
    exist in any format (as in Liger, Hsu et al. 2024, https://arxiv.org/abs/2410.10989). Without `chunk_tokens`, up to
    FEW_LOGITS logits are left to autograd.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    if chunk_tokens is None and len(hidden) * len(weight) <= FEW_LOGITS:
        return cross_entropy_sum(F.linear(hidden.to(dtype), weight.to(dtype)), targets)
    chunk_tokens = chunk_tokens or default_chunk_tokens(hidden, len(weight))
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, weight, targets, logit_loss, chunk_tokens, dtype)  # type: ignore[return-value]
    weight = weight.to(dtype)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows in _chunks(len(hidden), chunk_tokens):
        total += cross_entropy_sum(F.linear(hidden[rows].to(dtype), weight), targets[rows])
    return total


def default_chunk_tokens(hidden: Tensor, vocabulary_size: int) -> int:
    """Tokens whose logits exist at once, for `hidden` [N, D].

    On a CPU about CHUNK_LOGITS / V, and at least 256, or products would be slow. On GPUs, where each chunk launches kernels and
    adds to the head's gradient of V * D numbers, 4096 or D, whichever is larger: then adding costs no more than the logits.
    """
    return max(256, CHUNK_LOGITS // vocabulary_size) if hidden.device.type == "cpu" else max(4096, hidden.shape[1])


def _chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    """Slices of equal size, except for the last one."""
    size = -(-tokens // -(-tokens // chunk_tokens))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, logit_loss: LogitLoss, chunk_tokens: int, dtype: torch.dtype
    ) -> Tensor:
        # Cast once; autocast would cast the weight for each chunk.
        with torch.autocast(hidden.device.type, enabled=False):
            cast_hidden, cast_weight = hidden.to(dtype), weight.to(dtype)
            counted = (targets != IGNORED_TARGET).unsqueeze(1)
            # In float16 the gradients are kept in float32: they are not scaled with the loss, and may be arbitrarily small.
            kept = torch.float32 if dtype == torch.float16 else None
            hidden_gradient, weight_gradient = torch.empty_like(hidden, dtype=kept), torch.empty_like(weight, dtype=kept)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            for rows in _chunks(len(hidden), chunk_tokens):
                part = cast_hidden[rows]
                loss, logit_gradient = logit_loss(F.linear(part, cast_weight), targets[rows])
                total += loss
                hidden_gradient[rows] = _product(logit_gradient, cast_weight).masked_fill_(~counted[rows], 0)
                part = part.masked_fill(~counted[rows], 0)
                _add_product(weight_gradient, logit_gradient.T, part, is_first=rows.start == 0)
                del logit_gradient  # before the next chunk's is allocated
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        hidden_gradient, weight_gradient = ctx.saved_tensors
        # In place: a copy of the head's gradient, V * D numbers, would be a step's peak of memory. A second backward pass is an
        # error of autograd, which notices that a saved tensor has changed.
        return hidden_gradient.mul_(gradient), weight_gradient.mul_(gradient), None, None, None, None


def _product(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient @ factor, for a gradient of logits from LogitLoss; if that is float16, in float32 and divided by FP16_SCALE.

    In float16, sums of frequent tokens could overflow, and those of rare tokens would lose bits.
    """
    if gradient.dtype != torch.float16:
        return gradient @ factor
    if gradient.device.type == "cuda" and torch.version.hip is None:
        product = torch.mm(gradient, factor, out_dtype=torch.float32)
    else:
        product = gradient.float() @ factor.float()
    return product.mul_(1 / FP16_SCALE)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """total += _product(left, right), in the format of `total`, which is uninitialised if this `is_first`.

    On a CPU as many rows at a time as fit in its cache: the head of a vocabulary of 50,000 has 150 MB, and writing and reading
    a product of that size, its float32 copy and the zeros to add it to took a twentieth of a step.
    """
    most = FP16_ROWS if left.dtype == torch.float16 else len(total)
    rows_at_once = CACHED_ROWS if total.device.type == "cpu" else most
    for start in range(0, len(total), rows_at_once):
        rows = slice(start, start + rows_at_once)
        part = total[rows]
        if is_first:
            part.zero_()
        if total.dtype == left.dtype:
            part.addmm_(left[rows], right)
        else:
            part += _product(left[rows], right)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Sum of the token losses of `batch` under `model`.

    Inputs in a dictionary are passed to the model by name. A model whose forward takes `targets` sums its own loss; the output
    of other models is logits, or has them as `.logits` (Hugging Face). Raises ConfigError if the batch has document ids and the
    model takes none.
    """
    by_name = isinstance(batch.input_ids, Mapping)
    inputs, named = ((), dict(batch.input_ids)) if by_name else ((batch.input_ids,), {})
    if getattr(batch, "document_ids", None) is not None:
        check_model_takes_document_ids(model)
        named["document_ids"] = batch.document_ids
    if takes(model, "targets"):
        return model(*inputs, targets=batch.targets, **named)
    if takes(model, "use_cache"):
        # Unused keys and values of all tokens would stay in memory until the backward pass.
        named["use_cache"] = False
    output = model(*inputs, **named)
    return cross_entropy_sum(getattr(output, "logits", output), batch.targets)


def check_model_takes_document_ids(model: nn.Module) -> None:
    """Raises ConfigError if the forward of `model` has no parameter `document_ids`, which keeps documents apart."""
    if takes(model, "document_ids"):
        return
    name = type(_inner(model)).__name__
    if takes(model, "documents"):
        raise ConfigError(
            f"data.document_mask: the forward of {name} takes `documents`; rename the parameter to `document_ids`"
        )
    raise ConfigError(
        f"data.document_mask: is true, but the forward of {name} takes no `document_ids`, which keeps documents apart; "
        "set it to false, or data.packing to false for one document per sequence"
    )


def takes(model: nn.Module, parameter: str) -> bool:
    """Whether the forward method of `model`, or of the module that it wraps, has a parameter of that name."""
    return parameter in _forward_parameters(type(_inner(model)))


def _inner(model: nn.Module) -> nn.Module:
    return model.module if hasattr(model, "module") and isinstance(model.module, nn.Module) else model


@cache
def _forward_parameters(model_class: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)
