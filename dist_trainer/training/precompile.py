"""Compiles before the first step what would otherwise be compiled in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn
from torch.utils.data import DataLoader

from dist_trainer.data.loader import varies_in_length
from dist_trainer.data.sampler import ValidationSampler
from dist_trainer.distributed.collectives import run_and_share_errors
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.models.evaluation_mode import evaluation_mode
from dist_trainer.parallel.buffers import Buffers
from dist_trainer.parallel.compile import compile_settings, is_compiled
from dist_trainer.parallel.registry import compute_loss, first_sync_differs, gradient_sync, unwrap
from dist_trainer.training.precision import Precision
from dist_trainer.training.step import seed_dropout
from dist_trainer.training.validation import LossFunction


def precompile(
    model: nn.Module,
    train_data: DataLoader,
    validation_data: DataLoader | None,
    world: DistributedContext,
    precision: Precision,
    loss_function: LossFunction,
    step_context: Callable[[], AbstractContextManager[None]],
) -> None:
    """Compile where a signal can interrupt it, and bring DDP into the state it has in a run that was never stopped.

    Training, in contexts that `step_context` makes, and validation are compiled separately. Buffers keep their values. Raises
    StoppedError. DDP sorts its buckets by the order in which gradients came in its first backward pass; with more than two
    ranks that changes the order of summation, and so the last bits, of only the first step after a resume.
    """

    def rehearse(*, exchange: bool, shorter_by: int = 0) -> None:
        batch = next(iter(train_data)).shortened(shorter_by).to(world.device)
        seed_dropout(0, 0, block=0)
        with step_context(), gradient_sync(model, enabled=exchange):
            with precision.autocast():
                loss = compute_loss(model, loss_function, batch)
            (loss * 0.0).backward()
        model.zero_grad(set_to_none=True)

    def rehearse_validation(*, shorter_by: int = 0) -> None:
        if validation_data is None or (first := next(iter(validation_data), None)) is None:
            return  # there are more ranks than blocks of sequences
        evaluated = unwrap(model)
        with evaluation_mode(evaluated), torch.no_grad(), precision.autocast():
            for sequences in _sequences_per_block(validation_data):
                loss_function(evaluated, first.first_sequences(sequences).shortened(shorter_by).to(world.device))

    if not unwrap(model).training:  # Hugging Face's from_pretrained leaves it in evaluation mode
        model.train()
    with ExitStack() as conditions:
        conditions.enter_context(Buffers(unwrap(model), world).unchanged())
        conditions.enter_context(compile_settings(model, world.device, number_format=precision.name))
        if compiles_in_a_step(model, train_data, world.device):
            run_and_share_errors(world, lambda: rehearse(exchange=False))
            run_and_share_errors(world, rehearse_validation)
            if varies_in_length(train_data.dataset):  # a second length: then the compiler generalizes to any
                run_and_share_errors(world, lambda: rehearse(exchange=False, shorter_by=1))
                run_and_share_errors(world, lambda: rehearse_validation(shorter_by=1))
        if first_sync_differs(model, world):
            rehearse(exchange=True)


def compiles_in_a_step(model: nn.Module, train_data: DataLoader, device: torch.device) -> bool:
    """Whether the first step would compile: `model` itself, or attention within documents on a GPU, which always is."""
    if is_compiled(unwrap(model)):
        return True
    return device.type == "cuda" and getattr(train_data.dataset[0], "document_ids", None) is not None


def _sequences_per_block(validation_data: DataLoader) -> set[int]:
    """How many sequences a block may have: the last one may have fewer."""
    sampler: ValidationSampler = validation_data.sampler  # type: ignore[assignment]
    full = min(sampler.micro_batch_size, sampler.num_sequences)
    return {full, sampler.num_sequences % full or full}
