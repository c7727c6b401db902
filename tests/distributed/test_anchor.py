"""The trainer against a plain loop that has none of its code: what equalities between two of its runs cannot see."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.loader import create_dataloaders
from dist_trainer.models.decoder_lm import DecoderLM
from tests.distributed.ranks import run_ranks
from tests.distributed.small_runs import metrics, run, small_config, weights

VOCABULARY = 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp32": 5e-5, "bf16": 2e-3, "fp16": 2e-3}
"""Relative, between one process and two ranks: products in half precision enlarge differences of float32's rounding."""


def plain_loop(config: TrainingConfig) -> tuple[list[dict[str, float]], float, dict[str, np.ndarray]]:
    """The documented step, written out for one process: its loss, rate and gradient norm at each step, then the validation loss
    and the weights.
    """
    torch.set_num_threads(1)
    optim, dtype = config.optim, DTYPES[config.precision.dtype]
    model = DecoderLM(config.model, VOCABULARY, config.data.sequence_length)
    model.init_weights(config.seed)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    loader, validation_batches = create_dataloaders(config)
    loader.sampler.seek(0)
    batches, lines = iter(loader), []
    steps, warmup = config.train.max_steps, config.schedule.warmup_steps
    for step in range(steps):
        micro_batches = [next(batches) for _ in range(config.batch.global_batch_size // config.batch.micro_batch_size)]
        target_tokens = sum(int((batch.targets != -100).sum()) for batch in micro_batches)
        loss_sum = 0.0
        for block, batch in enumerate(micro_batches):
            digest = hashlib.blake2b(f"{config.seed}/{step}/{block}".encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest, "little"))
            loss = summed_loss(model, batch, dtype)
            scaler.scale(loss / target_tokens).backward()
            loss_sum += loss.item()
            if block == 1:
                first_pair = [parameter.grad for parameter in parameters]
                optimizer.zero_grad()
        for parameter, gradient in zip(parameters, first_pair, strict=True):
            parameter.grad += gradient
        scaler.unscale_(optimizer)
        # Not clip_grad_norm_: torch's norm of a large matrix is wrong by 1e-5 on a CPU.
        norm = sum(parameter.grad.double().square().sum() for parameter in parameters).sqrt().float()
        clip_grads_with_norm_(parameters, optim.max_grad_norm, norm)
        wave = (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup))) / 2
        ratio = config.schedule.min_lr_ratio
        rate = optim.learning_rate * min(1.0, (step + 1) / warmup) * (ratio + (1 - ratio) * wave)
        for group in optimizer.param_groups:
            group["lr"] = rate
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        lines.append({"loss": loss_sum / target_tokens, "lr": rate, "grad_norm": norm.item()})
    model.eval()
    with torch.no_grad():
        sums = [(summed_loss(model, batch, dtype).item(), int((batch.targets != -100).sum())) for batch in validation_batches]
    validation_loss = sum(loss for loss, _ in sums) / sum(targets for _, targets in sums)
    return lines, validation_loss, {f"model.{name}": parameter.detach().numpy() for name, parameter in model.named_parameters()}


def summed_loss(model: DecoderLM, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Of the batch's targets, from logits in `dtype`."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits: Tensor = model(batch.input_ids)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-100, reduction="sum")


def anchored_config(stories: Any, output_dir: Any, dtype: str) -> TrainingConfig:
    """One in which each part of the step shows: every update is clipped, eps keeps AdamW from dividing a scale out again, decay
    is strong, and micro-batches have different numbers of targets.
    """
    changes = {"precision__dtype": dtype, "model__dropout": 0.2, "data__packing": False, "train__max_steps": 8}
    optim = {"optim__name": "adamw", "optim__max_grad_norm": 0.25, "optim__eps": 1e-3, "optim__weight_decay": 1.0}
    return small_config(stories, output_dir, **changes, **optim, optim__learning_rate=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_norms_rates_and_weights_are_those_of_a_plain_loop(stories, tmp_path, dtype):
    [(lines, validation_loss, last_weights)] = run_ranks(1, lambda: plain_loop(anchored_config(stories, tmp_path, dtype)))
    assert all(0.25 < line["grad_norm"] < math.inf for line in lines), "every update is clipped, none is skipped"
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    for world_size, tolerance in ((1, 1e-6), (2, TOLERANCES[dtype])):
        config = anchored_config(stories, tmp_path / str(world_size), dtype)
        assert run(config, world_size) == [0] * world_size
        found = metrics(config)
        assert [line["lr"] for line in found] == pytest.approx([line["lr"] for line in lines], rel=1e-9)
        for name in ("loss", "grad_norm"):
            assert [line[name] for line in found] == pytest.approx([line[name] for line in lines], rel=tolerance), name
        assert metrics(config, "validation")[-1]["loss"] == pytest.approx(validation_loss, rel=tolerance)
        ours = weights(config)
        assert ours.keys() == last_weights.keys()
        for name, expected in last_weights.items():
            difference = np.linalg.norm(ours[name].numpy() - expected) / np.linalg.norm(expected)
            assert difference < tolerance, name
