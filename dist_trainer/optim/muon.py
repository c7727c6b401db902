"""Muon, many matrices at a time, beside AdamW for all that is no hidden matrix: two optimizers that appear as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dist_trainer.optim.adamw import AdamW
from dist_trainer.optim.sharded_map import num_ranks, sharded_map
from dist_trainer.optim.uncompiled import EagerOptimizer

OUTPUT_HEADS = ("lm_head", "output", "head")
"""Names under which models that do not tell (get_output_embeddings) keep the matrix that makes logits."""
MATRIX_PRODUCTS = ("Linear", "Conv1D")
"""Classes of modules whose `weight` is a matrix that hidden states are multiplied by; Conv1D is GPT-2's, in transformers."""
ELEMENTS_AT_ONCE = 2**23
"""Of matrices that a rank orthogonalises together: what bounds the memory of an update."""
MATCHING_ADAMW = 0.2
"""An update's root mean square, about that of AdamW's: so one learning rate, and one decay, suit both (Liu et al. 2025)."""


class Muon(EagerOptimizer, torch.optim.Muon):
    """torch.optim.Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon), its updates scaled as in Liu et al. 2025,
    arXiv:2502.16982, and with three differences.

    Matrices of one shape are orthogonalised together, and each on one rank alone, which hands it to the others. Where the
    attribute `found_inf` is a tensor that is not 0, the step leaves all as it is, without waiting for the device (the protocol
    between GradScaler and fused optimizers); gradients must have been unscaled, and they and `found_inf` be the same on all
    ranks. And on a CPU products are in float32, not in bfloat16, which there gains little, and would set runs on different
    numbers of ranks visibly apart.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for matrices in _of_one_shape([matrix for matrix in group["params"] if matrix.grad is not None]):
                self._update(matrices, group, found_inf)

    def init_optimizer_state(self) -> None:
        """State as the first step would make it, for matrices that have none."""
        for matrix in (matrix for group in self.param_groups for matrix in group["params"]):
            self._mean(matrix)

    def _update(self, matrices: list[Tensor], group: dict[str, Any], found_inf: Tensor | None) -> None:
        decay: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        rate: float | Tensor = group["lr"] * MATCHING_ADAMW * math.sqrt(max(matrices[0].shape))
        skips = None if found_inf is None else found_inf != 0
        if skips is not None:
            decay, rate = torch.where(skips, 1.0, decay), torch.where(skips, 0.0, rate)
        momentum, coefficients, steps, eps = (group[name] for name in ("momentum", "ns_coefficients", "ns_steps", "eps"))

        def directions_of(share: list[Tensor]) -> Tensor:
            ahead = torch.stack([self._gradient(matrix, skips).lerp(self._mean(matrix), momentum) for matrix in share])
            return newton_schulz(ahead, coefficients=coefficients, steps=steps, eps=eps)

        for matrix in matrices:
            self._mean(matrix).lerp_(self._gradient(matrix, skips), 1 - momentum)
        directions = sharded_map(matrices, directions_of)
        for matrix, direction in zip(matrices, directions, strict=True):
            matrix.mul_(decay).sub_(direction.to(matrix.dtype) * rate)

    def _mean(self, matrix: Tensor) -> Tensor:
        """The running mean of its gradients."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]

    def _gradient(self, matrix: Tensor, skips: Tensor | None) -> Tensor:
        """Where the update is skipped, the mean of those before: it changes nothing of that, and is finite."""
        assert matrix.grad is not None, "only matrices with a gradient are updated"
        return matrix.grad if skips is None else torch.where(skips, self._mean(matrix), matrix.grad)


def newton_schulz(matrices: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Each of `matrices` [n, rows, columns] with its singular values near 1, by Newton and Schulz's iteration with Jordan's
    coefficients: in bfloat16 on GPUs that have it, else in float32.
    """
    a, b, c = coefficients
    x = matrices.bfloat16() if _has_bfloat16(matrices.device) else matrices
    is_tall = x.size(-2) > x.size(-1)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


@cache
def _has_bfloat16(device: torch.device) -> bool:
    # including_emulation=False: older GPUs emulate it, slowly.
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _of_one_shape(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """`matrices` by shape, no more at a time than give each rank ELEMENTS_AT_ONCE to do."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for alike in by_shape.values():
        count = num_ranks() * max(1, ELEMENTS_AT_ONCE // max(1, alike[0].numel()))
        yield from (alike[begin : begin + count] for begin in range(0, len(alike), count))


class MuonWithAdamW(EagerOptimizer):
    """Muon for some matrices, AdamW for all other parameters; groups and state of both in one place."""

    _step_supports_amp_scaling = True

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `found_inf` says that one is not finite."""
        for part in self._up_to_date_parts():
            part.grad_scale, part.found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # type: ignore[attr-defined]
            part.step()

    def init_optimizer_state(self) -> None:
        """State as the first step would make it, for parameters that have none."""
        for part in self._up_to_date_parts():
            part.init_optimizer_state()

    def _up_to_date_parts(self) -> Iterator[Muon | AdamW]:
        """Both, with the groups and the state that are theirs."""
        begin = 0
        for part in self.parts:
            count = len(part.param_groups)
            # Anew each time: load_state_dict replaces both, and the trainer writes learning rates into the groups.
            part.param_groups = self.param_groups[begin : begin + count]
            part.state = self.state
            yield part
            begin += count


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable matrices between embedding and output head, and all other trainable parameters.

    Rows of embeddings and of output heads belong to words, not to directions: Muon does not suit them (Jordan 2024). Of a
    mixture's experts in one tensor [experts, rows, columns], none is among the matrices.
    """
    products = [module for module in model.modules() if _multiplies_by_a_matrix(module)]
    words = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    words |= {id(parameter) for head in _output_heads(model) for parameter in head.parameters()}
    inside = {id(module.weight) for module in products} - words
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in parameters if id(p) in inside], [p for p in parameters if id(p) not in inside]


def _multiplies_by_a_matrix(module: nn.Module) -> bool:
    known = any(kind.__name__ in MATRIX_PRODUCTS for kind in type(module).__mro__)
    return known and isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 2


def _output_heads(model: nn.Module) -> list[nn.Module]:
    tells = getattr(model, "get_output_embeddings", None)
    told = tells() if callable(tells) else None
    if isinstance(told, nn.Module):
        return [told]
    return [module for name, module in model.named_children() if name in OUTPUT_HEADS]
