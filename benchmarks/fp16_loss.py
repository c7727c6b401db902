"""Errors of the output head's gradient in fp16: our chunked loss compared with plain AMP, by token frequency.

python -m benchmarks.fp16_loss [--vocabulary 50257] [--hidden_size 64] [--tokens 512] [--scale 65536]

Errors are relative to a row's (or for hidden states, the whole gradient's) norm in float64, from the same values in float16, so
only the backward pass is compared. Both gradients are those of the mean loss times `--scale`, divided by the scale afterwards.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import machine_and_versions
from dist_trainer.models import loss
from dist_trainer.models.loss import LogitLoss, linear_cross_entropy_sum

SUMMED_LOSS = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden [N, D], weight [V, D], targets [N] to the sum of the token losses."""


def problem_of(vocabulary: int, hidden_size: int, tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """`hidden` [N, D], `weight` [V, D], in float32 of float16's values, and `targets` [N].

    The r-th token's probability is proportional to r^-1.5, steeper than Zipf's law: in context, a trained model gives most
    tokens far less than their frequency. Its logits have noise of standard deviation 1.
    """
    generator = torch.Generator().manual_seed(0)
    log_probabilities = -1.5 * torch.arange(1, vocabulary + 1, dtype=torch.float64).log()
    targets = torch.multinomial(log_probabilities.exp(), tokens, replacement=True, generator=generator)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    weight = torch.randn(vocabulary, hidden_size, generator=generator) / hidden_size**0.5
    hidden[:, 0], weight[:, 0] = 4.0, log_probabilities.float() / 4
    return hidden.half().float().to(device), weight.half().float().to(device), targets.to(device)


def exact_gradients(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss in float64, from the float16 logits: the best that a backward pass in fp16 can reach."""
    probabilities = F.softmax(F.linear(hidden.half(), weight.half()).double(), dim=-1)
    probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1
    probabilities /= len(targets)
    return probabilities @ weight.double(), probabilities.T @ hidden.double()


def gradients(summed_loss: SUMMED_LOSS, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss as in an fp16 step: scaled, then divided by the scale in float32."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast(hidden.device.type, dtype=torch.float16):
        total = summed_loss(hidden, weight, targets)
    (total * (scale / len(targets))).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad.double() / scale, weight.grad.double() / scale


def plain_amp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As written by hand."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As DecoderLM does it."""
    return linear_cross_entropy_sum(hidden, weight, targets, logit_loss=LogitLoss(), chunk_tokens=256)


def unscaled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """In chunks, with softmax - onehot rounded without scaling it: shows why the scale is needed."""
    kept, loss.FP16_SCALE = loss.FP16_SCALE, 1.0
    try:
        return in_chunks(hidden, weight, targets)
    finally:
        loss.FP16_SCALE = kept


CONTESTANTS: dict[str, SUMMED_LOSS] = {"plain AMP": plain_amp, "unscaled, in chunks": unscaled, "in chunks": in_chunks}


def errors(summed_loss: SUMMED_LOSS, problem: tuple[Tensor, Tensor, Tensor], scale: float) -> dict[str, float]:
    """The median relative error of the head's rows, by token rank, and that of the hidden states' gradient."""
    exact_hidden, exact_weight = exact_gradients(*problem)
    found_hidden, found_weight = gradients(summed_loss, *problem, scale)
    of_rows = (found_weight - exact_weight).norm(dim=1) / exact_weight.norm(dim=1)
    found, start = {}, 0
    for end in (10, 100, 1000, 10_000, len(of_rows)):
        if end <= len(of_rows) and end > start:
            found[f"words {start + 1} to {end}"] = of_rows[start:end].median().item()
            start = end
    found["hidden states"] = float((found_hidden - exact_hidden).norm() / exact_hidden.norm())
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--scale", type=float, default=65536.0, help="of the loss; GradScaler begins with 65536")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    problem = problem_of(arguments.vocabulary, arguments.hidden_size, arguments.tokens, arguments.device)
    found = {name: errors(function, problem, arguments.scale) for name, function in CONTESTANTS.items()}
    print(machine_and_versions(), vars(arguments), "\n")
    print(f"| relative error of the gradient of | {' | '.join(found)} |")
    print("|---|" + "---|" * len(found))
    for what in found["plain AMP"]:
        print(f"| {what} | {' | '.join(f'{of_one[what]:.1e}' for of_one in found.values())} |")


if __name__ == "__main__":
    main()
