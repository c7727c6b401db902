"""Muon for hidden matrices, batched and distributed over the ranks, together with AdamW for all other parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

OUTPUT_HEADS = ("lm_head", "output", "head")
"""Names of the output head in models without get_output_embeddings."""
MATRIX_PRODUCTS = ("Linear", "Conv1D")
"""Classes of modules whose `weight` is a matrix that hidden states are multiplied by; Conv1D is GPT-2's, in transformers."""
MATRICES_AT_ONCE = 4
"""Matrices of one shape that are multiplied together, on any number of ranks: more at once may be rounded differently."""
MATCHING_ADAMW = 0.2
"""Root mean square of an update, about that of AdamW, so that one learning rate and decay suit both (Liu et al. 2025)."""


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon), its updates scaled as in Liu et al. 2025,
    arXiv:2502.16982, with three differences.

    Matrices of one shape are orthogonalized together, each on one rank, which sends it to the others. If the attribute
    `found_inf` is a non-zero tensor, the step changes nothing, without waiting for the device (the protocol between GradScaler
    and fused optimizers); gradients must have been unscaled, and they and `found_inf` must be the same on all ranks. On a CPU,
    products are in float32 instead of bfloat16, which saves little time there and would make runs on different numbers of ranks
    visibly different.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for batches in _batches_per_rank([matrix for matrix in group["params"] if matrix.grad is not None]):
                self._update(batches, group, found_inf)

    def _update(self, batches: list[list[Tensor]], group: dict[str, Any], found_inf: Tensor | None) -> None:
        matrices = [matrix for batch in batches for matrix in batch]
        decay: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        rate: float | Tensor = group["lr"] * MATCHING_ADAMW * math.sqrt(max(matrices[0].shape))
        skips = None if found_inf is None else found_inf != 0
        if skips is not None:
            decay, rate = torch.where(skips, 1.0, decay), torch.where(skips, 0.0, rate)
        momentum, coefficients, steps, eps = (group[name] for name in ("momentum", "ns_coefficients", "ns_steps", "eps"))

        def orthogonalize(batch: list[Tensor]) -> Tensor:
            updates = [self._gradient(matrix, skips).lerp(self.momentum_buffer(matrix), momentum) for matrix in batch]
            return newton_schulz(torch.stack(updates), coefficients=coefficients, steps=steps, eps=eps)

        for matrix in matrices:
            self.momentum_buffer(matrix).lerp_(self._gradient(matrix, skips), 1 - momentum)
        directions = all_gather_map(batches, orthogonalize)
        for matrix, direction in zip(matrices, directions, strict=True):
            matrix.mul_(decay).sub_(direction.to(matrix.dtype) * rate)

    def momentum_buffer(self, matrix: Tensor) -> Tensor:
        """The running mean of its gradients; zeros if there is none yet."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]

    def _gradient(self, matrix: Tensor, skips: Tensor | None) -> Tensor:
        """Its gradient; in a skipped step the running mean, which is finite and which averaging does not change."""
        assert matrix.grad is not None, "only matrices with a gradient are updated"
        return matrix.grad if skips is None else torch.where(skips, self.momentum_buffer(matrix), matrix.grad)


def newton_schulz(matrices: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Each of `matrices` [n, rows, columns] with its singular values moved near 1, by the Newton-Schulz iteration with Jordan's
    coefficients: in bfloat16 on GPUs that support it, else in float32.
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


def _batches_per_rank(matrices: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """`matrices` of one shape in batches of at most MATRICES_AT_ONCE, in lists of at most one batch for each rank."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for same_shape in by_shape.values():
        batches = [same_shape[begin : begin + MATRICES_AT_ONCE] for begin in range(0, len(same_shape), MATRICES_AT_ONCE)]
        yield from (batches[begin : begin + num_ranks()] for begin in range(0, len(batches), num_ranks()))


def num_ranks() -> int:
    """Ranks of torch's default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather_map(batches: list[list[Tensor]], function: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """`function(batch)`, [n, *shape], of each of `batches`, concatenated, on every rank; rank r computes batch r. A collective.

    There are at most as many batches as ranks, and none is longer than the first. `function` takes a list of tensors and
    returns their results, stacked. All ranks get the same bits, even if their devices would round differently.
    """
    ranks = num_ranks()
    if ranks == 1:
        return function(batches[0])
    result = function(batches[min(dist.get_rank(), len(batches) - 1)])
    # all_gather needs equal sizes: a shorter last batch is padded, and ranks without a batch send values that are ignored.
    padded = result.new_empty((len(batches[0]), *result.shape[1:]))
    padded[: len(result)] = result
    gathered = padded.new_empty((ranks, *padded.shape))
    dist.all_gather(list(gathered), padded)
    return torch.cat([results[: len(batch)] for results, batch in zip(gathered, batches, strict=False)])


class MuonWithAdamW(Optimizer):
    """Muon for some matrices, AdamW for all other parameters, as one optimizer with the groups and the state of both."""

    _step_supports_amp_scaling = True

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `found_inf` says that one is not finite."""
        for part in self.parts_in_sync():
            part.grad_scale, part.found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # type: ignore[attr-defined]
            part.step()

    def parts_in_sync(self) -> Iterator[Muon | AdamW]:
        """Both optimizers, with this one's current groups and state."""
        begin = 0
        for part in self.parts:
            count = len(part.param_groups)
            # Each time: load_state_dict replaces groups and state, and the trainer writes learning rates into the groups.
            part.param_groups = self.param_groups[begin : begin + count]
            part.state = self.state
            yield part
            begin += count


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable matrices between embedding and output head, and all other trainable parameters.

    Each row of an embedding or an output head belongs to a token of the vocabulary: Muon does not suit them (Jordan 2024).
    Experts in one tensor [experts, rows, columns] are not among the matrices.
    """
    products = [module for module in model.modules() if _multiplies_by_a_matrix(module)]
    vocab = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    vocab |= {id(parameter) for head in _output_heads(model) for parameter in head.parameters()}
    hidden = {id(module.weight) for module in products} - vocab
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in parameters if id(p) in hidden], [p for p in parameters if id(p) not in hidden]


def _multiplies_by_a_matrix(module: nn.Module) -> bool:
    is_known = any(kind.__name__ in MATRIX_PRODUCTS for kind in type(module).__mro__)
    return is_known and isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 2


def _output_heads(model: nn.Module) -> list[nn.Module]:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    if isinstance(head, nn.Module):
        return [head]
    return [module for name, module in model.named_children() if name in OUTPUT_HEADS]
