"""`OPTIMIZERS`: how weights follow from gradients, and which of them decay."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dist_trainer.config.registry import build
from dist_trainer.config.schema import OptimConfig, TrainingConfig
from dist_trainer.errors import ConfigError
from dist_trainer.optim.adamw import AdamW
from dist_trainer.optim.muon import Muon, MuonWithAdamW, hidden_matrices

log = logging.getLogger(__name__)

LARGE_MODEL = 50_000_000
"""Parameters."""
MUON_TOKENS = 16
"""Of a step, for each of hidden_size, from which Muon's products are a small part of it: for a matrix of n rows they are about
3.3 n / tokens of those of its forward and backward pass."""


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """The optimizer that `config.name` names, over all parameters of `model` that want a gradient.

    `auto` is AdamW here, which suits every model; what it is for a run says `resolve_optimizer_name`.
    """
    name = "adamw" if config.name == "auto" else config.name
    return build(OPTIMIZERS, name, "optim.name", config, model, kind=Optimizer)


def resolve_optimizer_name(config: TrainingConfig) -> OptimConfig:
    """`config.optim` with the row that `auto` means: Muon for a DecoderLM with random weights and steps of enough tokens, else
    AdamW (docs/decisions/optimizer.md).

    It follows from the config alone, so it is the same on every rank and at every start.
    """
    if config.optim.name != "auto":
        return config.optim
    model, tokens = config.model, config.batch.global_batch_size * config.data.sequence_length
    suits = model.name == "decoder_lm" and model.init_from is None and tokens >= MUON_TOKENS * model.hidden_size
    return replace(config.optim, name="muon" if suits else "adamw")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter exactly once: matrices decay, vectors and scalars (norms, biases) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def warn_of_default_learning_rate(config: OptimConfig, *, parameters: int, init_from: str) -> None:
    """Log where a model that has been trained before is to go on with the default, which is for random weights.

    2e-5 is usual for models of 0.1 to 10 billion parameters; small ones bear more: a tenth of what they began with.
    """
    if config.learning_rate == OptimConfig.learning_rate:
        log.warning(
            "optim.learning_rate: %g is the default, made for small models with random weights; for the trained one of %s "
            "try %s (docs/fine_tuning.md)",
            *(config.learning_rate, init_from, "2e-5" if parameters >= LARGE_MODEL else f"{config.learning_rate / 10:g}"),
        )


def init_optimizer_state(optimizer: Optimizer) -> None:
    """Make its running averages, zeros to begin with, where it has none: AdamW and Muon else do so in their first step.

    So what lasts lies together in memory, and too little memory is found out before the first step. Those of a parameter that
    never gets a gradient stay zeros.
    """
    if isinstance(optimizer, AdamW | Muon | MuonWithAdamW):
        optimizer.init_optimizer_state()


def adamw(config: OptimConfig, model: nn.Module) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), one fused kernel for all parameters."""
    return AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def muon(config: OptimConfig, model: nn.Module) -> Optimizer:
    """Muon for the matrices inside the model, AdamW for embeddings, output heads, vectors and all else, by one learning rate.

    betas and eps are AdamW's; Muon's momentum is 0.95, as torch has it.
    """
    inside, outside = hidden_matrices(model)
    if not inside:
        raise ConfigError("optim.name: muon updates matrices between embedding and output head, and this model has none")
    hidden = Muon(inside, lr=config.learning_rate, weight_decay=config.weight_decay)
    if not outside:
        return hidden
    return MuonWithAdamW(
        hidden,
        AdamW(
            parameter_groups(nn.ParameterList(outside), config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        ),
    )


OPTIMIZERS: dict[str, Callable[[OptimConfig, nn.Module], Optimizer]] = {"adamw": adamw, "muon": muon}
