"""`OPTIMIZERS`: the table of optimizers, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from dist_trainer.config.registry import build
from dist_trainer.config.schema import ModelConfig, OptimConfig
from dist_trainer.errors import ConfigError
from dist_trainer.optim.muon import Muon, MuonWithAdamW, hidden_matrices

MUON_TOKENS = 16
"""Tokens of a step per unit of hidden_size from which Muon's products are a small part of the step: for a matrix of n rows they
are about 3.3 n / tokens of those of its forward and backward pass."""


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """The optimizer that `config.name` names, over all parameters of `model` that require gradients.

    `auto` is AdamW here, which suits every model; `resolve_optimizer_name` chooses for a run.
    """
    name = "adamw" if config.name == "auto" else config.name
    return build(OPTIMIZERS, name, "optim.name", config, model, kind=Optimizer)


def resolve_optimizer_name(config: OptimConfig, model: ModelConfig, *, tokens_per_step: int) -> OptimConfig:
    """`config` with `auto` replaced: Muon for a DecoderLM with random weights and steps of enough tokens, else AdamW
    (docs/decisions/optimizer.md).

    Depends on the config only, so it is the same on every rank and at every start.
    """
    if config.name != "auto":
        return config
    suits_muon = model.name == "decoder_lm" and model.init_from is None and tokens_per_step >= MUON_TOKENS * model.hidden_size
    return replace(config, name="muon" if suits_muon else "adamw")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter exactly once: matrices decay; vectors and scalars (norms, biases) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(config: OptimConfig, model: nn.Module) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), one fused kernel for all parameters."""
    groups = parameter_groups(model, config.weight_decay)
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def muon(config: OptimConfig, model: nn.Module) -> Optimizer:
    """Muon for the model's hidden matrices, AdamW for embeddings, output heads, vectors and everything else, with the same
    learning rate.

    betas and eps are AdamW's; Muon's momentum is 0.95, torch's default.
    """
    hidden, others = hidden_matrices(model)
    if not hidden:
        raise ConfigError("optim.name: muon updates matrices between embedding and output head, and this model has none")
    optimizer = Muon(hidden, lr=config.learning_rate, weight_decay=config.weight_decay)
    return MuonWithAdamW(optimizer, adamw(config, nn.ParameterList(others))) if others else optimizer


OPTIMIZERS: dict[str, Callable[[OptimConfig, nn.Module], Optimizer]] = {"adamw": adamw, "muon": muon}


def init_optimizer_state(optimizer: Optimizer) -> None:
    """Create the running averages of AdamW and Muon as zeros where they are missing; otherwise their first step would.

    So long-lived memory is allocated together, and running out of it is noticed before the first step. Averages of a parameter
    that never gets a gradient stay zero.
    """
    if isinstance(optimizer, MuonWithAdamW):
        for part in optimizer.parts_in_sync():
            init_optimizer_state(part)
    elif isinstance(optimizer, Muon):
        for matrix in _parameters(optimizer):
            optimizer.momentum_buffer(matrix)
    elif type(optimizer) is AdamW and optimizer.defaults["fused"] and not optimizer.defaults["amsgrad"]:
        for parameter in _parameters(optimizer):
            if parameter not in optimizer.state:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _parameters(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
