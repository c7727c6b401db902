"""Attention: causal, over a sequence or within each of its documents; and rotary positions.

B batch, T sequence, H query heads, G key and value heads, K head size.

With a document mask, a token attends only to itself and earlier tokens of its document. Rotary positions need not restart in
each document: attention depends only on differences of positions (Su et al. 2021, arXiv:2104.09864, equation 16), which are
the same wherever a document starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_trainer.config.schema import ModelConfig
from dist_trainer.distributed.machine import missing_compiler

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DocumentMask: TypeAlias = "Tensor | BlockMask"
"""Which tokens attend to which: a tensor [B, 1, T, T] that is added to the scores, or FlexAttention's form of it, which skips
blocks that are masked completely."""

SMALLEST_FLEX_HEAD = 16
"""Smallest head size of FlexAttention on a GPU; it need not be a power of two."""
LARGEST_FLASH_HEAD = 256
"""Largest head size of torch's flash kernel."""


def document_mask(document_ids: Tensor, *, head_size: int, drops_out: bool, dtype: torch.dtype) -> DocumentMask:
    """The causal mask within documents; `document_ids` [B, T] is the number of each token's document in its sequence.

    FlexAttention's on GPUs, which computes only blocks that are not masked. It must be compiled, supports neither small heads
    nor dropout (`drops_out`), and has no backward pass on a CPU: then the dense mask is used, B * T * T numbers of `dtype`, the
    format of the scores.
    """
    suits = document_ids.device.type == "cuda" and head_size >= SMALLEST_FLEX_HEAD and not drops_out
    # If the caller is being compiled, there is a compiler; torch should not trace the question.
    if suits and (torch.compiler.is_compiling() or missing_compiler(document_ids.device) is None):
        return block_mask(document_ids)
    return dense_document_mask(document_ids, dtype)


def dense_document_mask(document_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T] of `dtype`: 0 where the query (third axis) attends to the key (last axis), else -inf.

    Not bool: each layer would convert it and keep the result for its backward pass, whereas this one is shared by all layers.
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    sees = same.logical_and_(same.new_ones(same.shape[-2:]).tril_())
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(sees.logical_not_(), -math.inf)


def block_mask(document_ids: Tensor) -> BlockMask:
    """The mask for FlexAttention."""
    # Imported here: some versions import sympy, 0.4 s of every start.
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[batch, query] == document_ids[batch, key])

    rows, length = document_ids.shape
    # Compiled, the T x T mask is never written to memory.
    make = _compiled_on_gpu(create_block_mask, document_ids)
    return make(sees, rows, None, length, length, device=document_ids.device)


def attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    mask: DocumentMask | None,
    *,
    causal: bool,
    dropout: float,
) -> Tensor:
    """Attention [B, H, T, K] under `mask`; without one, over all tokens, or over the current and earlier ones (`causal`).

    `dropout` is the probability of dropping a weight; with a BlockMask it must be 0.
    """
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import flex_attention

        flex = _compiled_on_gpu(flex_attention, q_BHTK)
        return flex(q_BHTK, k_BGTK, v_BGTK, block_mask=mask, enable_gqa=grouped)
    if grouped and not takes_groups(q_BHTK, mask):
        repeats = q_BHTK.shape[1] // k_BGTK.shape[1]
        k_BGTK, v_BGTK = (x.repeat_interleave(repeats, dim=1) for x in (k_BGTK, v_BGTK))
        grouped = False
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGTK, v_BGTK, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )


def takes_groups(q_BHTK: Tensor, mask: Tensor | None) -> bool:
    """Whether torch has a kernel for fewer key and value heads than query heads here whose memory is linear in T.

    On a GPU that is flash attention, in half precision on Ampere or later, without a mask. Otherwise grouped heads use a
    kernel that writes all H * T * T scores to memory, whereas repeated keys and values use the memory-efficient kernel
    (torch.nn.functional.scaled_dot_product_attention on `enable_gqa`). Compiled code follows the same rule: torch's compiler
    cannot trace torch.backends.cuda.can_use_flash_attention.
    """
    if q_BHTK.device.type != "cuda":
        return True
    suits = mask is None and q_BHTK.dtype in (torch.float16, torch.bfloat16) and q_BHTK.shape[-1] <= LARGEST_FLASH_HEAD
    return suits and torch.version.hip is None and torch.cuda.get_device_properties(q_BHTK.device).major >= 8


def _compiled_on_gpu(function: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """`function` compiled, unless its caller is being compiled or `tensor` is not on a GPU."""
    if torch.compiler.is_compiling() or tensor.device.type != "cuda":
        return function
    return _compiled(function)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


# ----------------------------------------------------------------------------------------------- rotary positions


def rotary_tables(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, K] of position * frequency, the K/2 frequencies twice (Su et al. 2021, arXiv:2104.09864)."""
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies(config, device))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """theta^(-2i/K), i < K/2, in radians per token, scaled as rope_type says.

    linear: all divided by rope_factor (positions interpolated; Chen et al. 2023, arXiv:2306.15595). llama3: divided by it if
    the wavelength 2π/f is above original context / low_freq_factor, unchanged if it is below original context /
    high_freq_factor, in between a mix of both, linear in original context / wavelength (Llama 3.1, as in transformers'
    modeling_rope_utils).
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.int64, device=device).float() / config.head_size
    plain = 1.0 / (config.rope_theta**exponents)
    if config.rope_type == "default":
        return plain
    stretched = plain / config.rope_factor
    if config.rope_type == "linear":
        return stretched
    turns = config.rope_original_max_position_embeddings * plain / (2 * math.pi)  # within the original context
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * stretched + share * plain


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate each pair of elements (i, i + K/2), as Hugging Face's Llama does."""
    first, second = x_BHTK.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x_BHTK.float() * cos_TK + rotated * sin_TK).to(x_BHTK.dtype)
