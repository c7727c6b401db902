"""The module that all contestants train, and its optimizer: DecoderLM with the same initial weights."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import workloads
from benchmarks.workloads import Workload
from dist_trainer.config.schema import ModelConfig
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.models.registry import ModelContext, build_model
from dist_trainer.optim.registry import parameter_groups


def build(workload: Workload, device: torch.device) -> DecoderLM:
    size = workload.size
    config = ModelConfig(**{name: getattr(size, name) for name in workloads.SHAPE})
    model = build_model(config, ModelContext(size.vocabulary_size, size.sequence_length, workloads.SEED, device))
    assert isinstance(model, DecoderLM)
    return model


def adamw(model: nn.Module, *, fused: bool = True) -> torch.optim.Optimizer:
    """torch's AdamW, with weight decay on matrices only, like ours."""
    return torch.optim.AdamW(
        parameter_groups(model, workloads.WEIGHT_DECAY),
        lr=workloads.LEARNING_RATE,
        betas=workloads.BETAS,
        eps=workloads.EPS,
        fused=fused,
    )
