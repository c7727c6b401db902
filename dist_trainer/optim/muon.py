"""Muon beside AdamW: two of torch's optimizers that appear as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

OUTPUT_HEADS = ("lm_head", "output", "head")
"""Names under which models keep the matrix that makes logits."""


class MuonWithAdamW(Optimizer):
    """Orthogonalised momentum for some matrices (Jordan 2024, https://kellerjordan.github.io/posts/muon; scaled as in Liu et
    al. 2025, arXiv:2502.16982), AdamW for all other parameters; groups and state of both in one place.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._parts: list[tuple[Optimizer, int]] = [(muon, len(muon.param_groups)), (adamw, len(adamw.param_groups))]
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        begin = 0
        for part, count in self._parts:
            # Anew each time: load_state_dict replaces both, and the trainer writes learning rates into the groups.
            part.param_groups = self.param_groups[begin : begin + count]
            part.state = self.state
            part.step()
            begin += count


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable matrices between embedding and output head, and all other trainable parameters.

    Rows of embeddings and of output heads belong to words, not to directions: Muon does not suit them (Jordan 2024).
    """
    outside = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in OUTPUT_HEADS
        for parameter in module.parameters()
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inside = [parameter for parameter in parameters if parameter.ndim == 2 and id(parameter) not in outside]
    chosen = {id(parameter) for parameter in inside}
    return inside, [parameter for parameter in parameters if id(parameter) not in chosen]
