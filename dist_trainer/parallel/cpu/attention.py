"""Causal attention on CPUs, as products of matrices with elementwise code between them that torch's compiler fuses.

torch's own kernel for CPUs multiplies small tiles, which in bfloat16 is slow: docs/decisions/speed.md has the figures.
The formulas are those of FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithms 2 and 4): the backward pass computes
the weights anew, from the scores and the logarithm of the sum of their exponentials; but those of short rows are kept.

N rows times heads, T sequence, S a block of queries, U the keys up to its end, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LENGTHS = range(128, 2049)
"""Sequence lengths where this is faster than torch's kernel in bfloat16. Of longer ones a block's scores outgrow the cache."""
_KEPT_KEYS = 8
"""Weights are kept for the backward pass where a query has at most so many for each of its K numbers: there they are up to a
third of what a block keeps, and a step takes a twentieth less."""
_BLOCK = 128
_MOST_BLOCKS = 8
"""Each is compiled for itself: compiling takes as long as they are many."""


def is_faster_by_products(q_BHTK: Tensor, k_BGTK: Tensor) -> bool:
    """Whether `causal_attention` is to be taken: where a model is compiled to be trained on a CPU in bfloat16.

    Ask only where all rows have one length: its number of blocks depends on that.
    """
    return (
        torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and q_BHTK.device.type == "cpu"
        and q_BHTK.dtype == torch.bfloat16
        and q_BHTK.shape[2] == k_BGTK.shape[2]
        and q_BHTK.shape[2] in LENGTHS
    )


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """[B, H, T, K]: scaled_dot_product_attention with `is_causal` and `enable_gqa`, as exact: scores and softmax are in
    float32; weights, and the gradients of scores, are rounded to the inputs' format before they are multiplied.
    """
    repeats = q_BHTK.shape[1] // k_BGTK.shape[1]
    if repeats > 1:
        k_BGTK, v_BGTK = (x.repeat_interleave(repeats, dim=1) for x in (k_BGTK, v_BGTK))
    y_NTK = _CausalAttention.apply(*(x.flatten(0, 1) for x in (q_BHTK, k_BGTK, v_BGTK)))
    return y_NTK.view(q_BHTK.shape)  # type: ignore[union-attr]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NTK: Tensor, k_NTK: Tensor, v_NTK: Tensor) -> Tensor:  # type: ignore[override]
        outputs, weights, log_sums = [], [], []
        scale = q_NTK.shape[-1] ** -0.5
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(q_NTK.shape[1]):
                scores_NSU = _scores(q_NTK.float() * scale, k_NTK.float(), block)
                largest = scores_NSU.amax(-1, keepdim=True)
                exponentials_NSU = (scores_NSU - largest).exp()
                sums = exponentials_NSU.sum(-1, keepdim=True)
                weights.append((exponentials_NSU / sums).to(v_NTK.dtype))
                outputs.append(weights[-1] @ v_NTK[:, : block.stop])
                log_sums.append(largest + sums.log())
        y_NTK = torch.cat(outputs, 1)
        kept = weights if _keeps_weights(q_NTK) else [torch.cat(log_sums, 1)]
        ctx.save_for_backward(q_NTK, k_NTK, v_NTK, y_NTK, *kept)
        return y_NTK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (dy_NTK,) = gradients
        q_NTK, k_NTK, v_NTK, y_NTK, *kept = ctx.saved_tensors
        dtype, length = q_NTK.dtype, q_NTK.shape[1]
        scale = q_NTK.shape[-1] ** -0.5
        dq, dk, dv = [], _SumsByBlock(length), _SumsByBlock(length)
        with torch.autocast("cpu", enabled=False):
            mean_NT1 = (dy_NTK.float() * y_NTK.float()).sum(-1, keepdim=True)
            dy_and_mean_NTJ, v_and_ones_NTJ = _factors_of_difference(dy_NTK, v_NTK, mean_NT1)
            weights = kept if _keeps_weights(q_NTK) else _weights_anew(q_NTK, k_NTK, *kept)
            for block, weights_NSU in zip(_blocks(length), weights, strict=True):
                seen = slice(0, block.stop)
                dweights_NSU = dy_and_mean_NTJ[:, block] @ v_and_ones_NTJ[:, seen].mT
                dscores_NSU = (weights_NSU * dweights_NSU.float()).to(dtype)
                dq.append(dscores_NSU @ k_NTK[:, seen])
                dk.add(dscores_NSU.mT @ q_NTK[:, block])
                dv.add(weights_NSU.to(dtype).mT @ dy_NTK[:, block])
            return (torch.cat(dq, 1) * scale).to(dtype), (dk.total() * scale).to(dtype), dv.total().to(dtype)


def _keeps_weights(q_NTK: Tensor) -> bool:
    return q_NTK.shape[1] <= _KEPT_KEYS * q_NTK.shape[2]


def _weights_anew(q_NTK: Tensor, k_NTK: Tensor, log_sum_NT1: Tensor) -> Iterator[Tensor]:
    """Those of one block of queries after the other, float32 [N, S, U].

    From twice the queries and half the keys: the same scores bit for bit, but to the compiler not what the forward pass has
    computed. That, N * T * T numbers, it would keep until now.
    """
    factors = q_NTK.float() * (2 * q_NTK.shape[-1] ** -0.5), k_NTK.float() * 0.5
    for block in _blocks(q_NTK.shape[1]):
        yield (_scores(*factors, block) - log_sum_NT1[:, block]).exp()


def _scores(q_NTK: Tensor, k_NTK: Tensor, block: slice) -> Tensor:
    """float32 [N, S, U]: of the queries in `block` with all keys up to its end; -inf where a key comes after the query.

    The product is in float32 too: one in bfloat16 rounds its result, scores of 8 to steps of 0.06.
    """
    scores_NSU = q_NTK[:, block] @ k_NTK[:, : block.stop].mT
    is_seen_SU = torch.arange(block.start, block.stop)[:, None] >= torch.arange(block.stop)
    return torch.where(is_seen_SU, scores_NSU, -math.inf)


def _factors_of_difference(dy_NTK: Tensor, v_NTK: Tensor, mean_NT1: Tensor) -> tuple[Tensor, Tensor]:
    """Two [N, T, J], J = K + 2, whose product is dy @ vT - mean.

    The difference is taken inside the product, which sums in float32 and rounds its result: rounded first, terms that nearly
    cancel would leave little but their errors. The mean goes in as two numbers of the inputs' format, for all of its bits.
    """
    # The upper half of a float32's bits is a bfloat16; a cast there and back would be left out by the compiler.
    high_NT1 = ((-mean_NT1).view(torch.int32) & -(1 << 16)).view(torch.float32)
    ones_NT1 = torch.ones_like(v_NTK[..., :1])
    parts = [part.to(dy_NTK.dtype) for part in (high_NT1, -mean_NT1 - high_NT1)]
    return torch.cat([dy_NTK, *parts], -1), torch.cat([v_NTK, ones_NT1, ones_NT1], -1)


class _SumsByBlock:
    """Sums of tensors [N, U, K] that begin at the first key and end at different ones, in float32."""

    def __init__(self, length: int) -> None:
        self.parts: list[list[Tensor]] = [[] for _ in _blocks(length)]
        self.size = next(_blocks(length)).stop

    def add(self, term_NUK: Tensor) -> None:
        for parts, part in zip(self.parts, term_NUK.split(self.size, dim=1), strict=False):
            parts.append(part)

    def total(self) -> Tensor:
        """[N, T, K]."""
        return torch.cat([sum(part.float() for part in parts) for parts in self.parts], 1)  # type: ignore[misc]


def _blocks(length: int) -> Iterator[slice]:
    """The queries, a block at a time."""
    size = max(_BLOCK, -(-length // _MOST_BLOCKS))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
