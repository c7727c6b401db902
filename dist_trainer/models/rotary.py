"""Rotary positions. B batch, T sequence, H heads, K head size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_trainer.config.schema import ModelConfig


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
