"""Causal attention on CPUs, as matrix products with elementwise code in between that torch's compiler fuses.

torch's CPU kernel multiplies small tiles, which is slow in bfloat16: docs/decisions/speed.md has the figures.
The formulas are those of FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithms 2 and 4): the backward pass recomputes
the weights from the scores and the logarithm of the sum of their exponentials; only those of short sequences are kept.

N batch times heads, T sequence, S a block of queries, U the keys up to the block's end, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LENGTHS = range(128, 2049)
"""Sequence lengths at which this beats torch's kernel in bfloat16; for longer ones a block's scores exceed the cache."""
_KEPT_KEYS = 8
"""Weights are kept for the backward pass if each query has at most this many per element of a head. They are then up to a third
of what a block keeps, and a step takes a twentieth less time."""
_BLOCK = 128
_MOST_BLOCKS = 8
"""Each block is compiled separately, so compile time grows with their number."""


def install_cpu_attention(model: nn.Module) -> None:
    """Have modules of `model` with an `attention_fn` use `causal_attention` in compiled training steps where it is faster.

    For models whose sequences all have one length, since the number of blocks depends on it. An `attention_fn` is a function
    like models/attention.py's `attention`.
    """
    replacements: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}  # one for all layers: they share compiled code
    for module in model.modules():
        original: Any = getattr(module, "attention_fn", None)
        if original is not None and not _is_replacement(original):
            module.attention_fn = replacements.setdefault(original, partial(_attention, original))  # type: ignore[assignment]


def has_cpu_attention(model: nn.Module) -> bool:
    """Whether `install_cpu_attention` has replaced a function in `model`."""
    return any(_is_replacement(getattr(module, "attention_fn", None)) for module in model.modules())


def _is_replacement(function: object) -> bool:
    return isinstance(function, partial) and function.func is _attention


def _attention(
    original: Callable[..., Tensor], q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: Any, *, causal: bool, dropout: float
) -> Tensor:
    """[B, H, T, K]: `causal_attention` where it is faster and computes the same as `original`, else that."""
    if mask is None and causal and dropout == 0 and _is_faster(q_BHTK, k_BGTK):
        return causal_attention(q_BHTK, k_BGTK, v_BGTK)
    return original(q_BHTK, k_BGTK, v_BGTK, mask, causal=causal, dropout=dropout)


def _is_faster(q_BHTK: Tensor, k_BGTK: Tensor) -> bool:
    """Whether this is being compiled for training on a CPU in bfloat16, at a suitable length."""
    return (
        torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and q_BHTK.device.type == "cpu"
        and q_BHTK.dtype == torch.bfloat16
        and q_BHTK.shape[2] == k_BGTK.shape[2]
        and q_BHTK.shape[2] in LENGTHS
    )


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """[B, H, T, K]: scaled_dot_product_attention with `is_causal` and `enable_gqa`, and as accurate: scores and softmax are in
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
            weights = kept if _keeps_weights(q_NTK) else _recomputed_weights(q_NTK, k_NTK, *kept)
            for block, weights_NSU in zip(_blocks(length), weights, strict=True):
                keys = slice(0, block.stop)
                dweights_NSU = dy_and_mean_NTJ[:, block] @ v_and_ones_NTJ[:, keys].mT
                dscores_NSU = (weights_NSU * dweights_NSU.float()).to(dtype)
                dq.append(dscores_NSU @ k_NTK[:, keys])
                dk.add(dscores_NSU.mT @ q_NTK[:, block])
                dv.add(weights_NSU.to(dtype).mT @ dy_NTK[:, block])
            return (torch.cat(dq, 1) * scale).to(dtype), (dk.total() * scale).to(dtype), dv.total().to(dtype)


def _keeps_weights(q_NTK: Tensor) -> bool:
    return q_NTK.shape[1] <= _KEPT_KEYS * q_NTK.shape[2]


def _recomputed_weights(q_NTK: Tensor, k_NTK: Tensor, log_sum_NT1: Tensor) -> Iterator[Tensor]:
    """The weights of each block of queries in turn, float32 [N, S, U].

    From twice the queries and half the keys: the scores have the same bits, but the compiler does not recognise them as those
    of the forward pass, which it would otherwise keep until now: N * T * T numbers.
    """
    factors = q_NTK.float() * (2 * q_NTK.shape[-1] ** -0.5), k_NTK.float() * 0.5
    for block in _blocks(q_NTK.shape[1]):
        yield (_scores(*factors, block) - log_sum_NT1[:, block]).exp()


def _scores(q_NTK: Tensor, k_NTK: Tensor, block: slice) -> Tensor:
    """float32 [N, S, U]: scores of the queries in `block` and all keys up to its end; -inf where a key is after the query.

    The product is in float32 too: in bfloat16 its result would be rounded, a score of 8 to steps of 0.06.
    """
    scores_NSU = q_NTK[:, block] @ k_NTK[:, : block.stop].mT
    is_seen_SU = torch.arange(block.start, block.stop)[:, None] >= torch.arange(block.stop)
    return torch.where(is_seen_SU, scores_NSU, -math.inf)


def _factors_of_difference(dy_NTK: Tensor, v_NTK: Tensor, mean_NT1: Tensor) -> tuple[Tensor, Tensor]:
    """Two [N, T, J], J = K + 2, whose product is dy @ vT - mean.

    The difference is taken inside the product, which sums in float32 and rounds its result once: if the terms were rounded
    first, those that nearly cancel would leave little but rounding errors. The mean is split into two numbers of the inputs'
    format, which together hold all of its bits.
    """
    # The upper half of a float32's bits is a bfloat16; the compiler would drop a cast there and back.
    high_NT1 = ((-mean_NT1).view(torch.int32) & -(1 << 16)).view(torch.float32)
    ones_NT1 = torch.ones_like(v_NTK[..., :1])
    parts = [part.to(dy_NTK.dtype) for part in (high_NT1, -mean_NT1 - high_NT1)]
    return torch.cat([dy_NTK, *parts], -1), torch.cat([v_NTK, ones_NT1, ones_NT1], -1)


class _SumsByBlock:
    """float32 sums of tensors [N, U, K] over the first U keys, for different U."""

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
    """Slices of the queries, one per block."""
    size = max(_BLOCK, -(-length // _MOST_BLOCKS))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
