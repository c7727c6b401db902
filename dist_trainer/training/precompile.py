"""Compiles and allocates before the first step instead of in it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader

from dist_trainer.data.loader import varies_in_length
from dist_trainer.data.sampler import ValidationSampler
from dist_trainer.distributed.collectives import run_and_share_errors
from dist_trainer.models.evaluation_mode import evaluation_mode
from dist_trainer.optim.registry import init_optimizer_state
from dist_trainer.parallel.compile import compile_settings, is_compiled
from dist_trainer.parallel.ddp import Buffers
from dist_trainer.parallel.registry import compute_loss, gradient_sync, unwrap
from dist_trainer.training.step import seed_dropout

if TYPE_CHECKING:
    from dist_trainer.training.trainer import Trainer


def precompile(trainer: Trainer) -> None:
    """Compile and allocate before the first step, where a stop signal can interrupt it; raises StoppedError. For all ranks.

    Training and validation are compiled separately. Parameters, buffers and the order of data do not change.
    With fast reduction on more than two ranks, DDP also sorts its buckets here, by the order in which gradients arrive in its
    first backward pass. Otherwise the first step after a resume would sum gradients in another order, with other last bits.
    """
    model, world = trainer.model, trainer.world

    def train_pass(*, exchange: bool, shorter_by: int = 0) -> None:
        batch = next(iter(trainer.train_data)).shortened(shorter_by).to(world.device)
        seed_dropout(0, 0, block=0)
        with trainer.step_context(), gradient_sync(model, enabled=exchange):
            with trainer.precision.autocast():
                loss = compute_loss(model, trainer.loss_function, batch)
            (loss * 0.0).backward()
        model.zero_grad(set_to_none=True)

    def validation_pass(*, shorter_by: int = 0) -> None:
        if trainer.validation_data is None or (first := next(iter(trainer.validation_data), None)) is None:
            return  # there are more ranks than blocks of sequences
        evaluated = unwrap(model)
        with evaluation_mode(evaluated), torch.no_grad(), trainer.precision.autocast():
            for sequences in _sequences_per_block(trainer.validation_data):
                batch = first.first_sequences(sequences).shortened(shorter_by).to(world.device)
                trainer.loss_function(evaluated, batch)

    if not unwrap(model).training:  # Hugging Face's from_pretrained leaves it in evaluation mode
        model.train()
    with ExitStack() as conditions:
        conditions.enter_context(Buffers(unwrap(model), world).unchanged())
        conditions.enter_context(compile_settings(model, world.device, number_format=trainer.precision.name))
        if compiles_in_a_step(model, trainer.train_data, world.device):
            run_and_share_errors(world, lambda: train_pass(exchange=False))
            run_and_share_errors(world, validation_pass)
            if varies_in_length(trainer.train_data.dataset):  # after a second length the compiler generalizes to any
                run_and_share_errors(world, lambda: train_pass(exchange=False, shorter_by=1))
                run_and_share_errors(world, lambda: validation_pass(shorter_by=1))
        if trainer.reduction.first_differs:
            train_pass(exchange=True)
    init_optimizer_state(trainer.optimizer)


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
