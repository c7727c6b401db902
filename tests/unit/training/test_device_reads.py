"""In the step nothing waits for the device, and between two steps only those that are logged do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_trainer.checkpoint import host_copy
from dist_trainer.checkpoint.host_copy import PinnedMemory
from dist_trainer.config.schema import (
    BatchConfig,
    CheckpointConfig,
    ModelConfig,
    TrackingConfig,
    TrainConfig,
    TrainingConfig,
    ValidationConfig,
)
from dist_trainer.data.loader import create_dataloaders
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.models.loss import model_loss
from dist_trainer.optim.registry import build_optimizer
from dist_trainer.tracking.tracker import TrackerList
from dist_trainer.training.callbacks import CallbackList
from dist_trainer.training.digests import WeightDigests
from dist_trainer.training.precision import Precision
from dist_trainer.training.step import StepResult
from dist_trainer.training.trainer import Trainer
from tests.unit.training.device_reads import DeviceReads

Act = Callable[[Tensor], Any]

READING: dict[str, Act] = {
    "item": lambda loss: loss.item(),
    "bool": bool,
    "float": lambda loss: float(loss.detach()),
    "int": lambda loss: int(loss.detach()),
    "format": lambda loss: f"{loss.detach():.3f}",
    "tolist": lambda loss: loss.tolist(),
    "numpy": lambda loss: loss.detach().numpy(),
    "cpu": lambda loss: loss.cpu(),
    "to": lambda loss: loss.to("cpu"),
    "nonzero": lambda loss: loss.nonzero(),
    "mask": lambda loss: loss[loss > 0],
    "equal": lambda loss: torch.equal(loss, loss),
    "synchronize": lambda loss: torch.cuda.synchronize(),
    "of a derived one": lambda loss: (loss.detach() * 2).isnan().any().item(),
}
ACT_AT = dict(enumerate(READING, start=2))
"""Step → what it reads besides, one after the other."""
STEPS = len(READING) + 2


def a_trainer(*callbacks: object, dtype: Any = "fp32") -> Trainer:
    """Whose first and last step alone are logged, with two micro-batches a step."""
    config = TrainingConfig(
        model=ModelConfig("decoder_lm", 16, 32, 2, num_attention_heads=2, num_key_value_heads=1, dropout=0.1),
        batch=BatchConfig(global_batch_size=4, micro_batch_size=2),
        train=TrainConfig(max_steps=STEPS),
        validation=ValidationConfig(every_steps=0),
        checkpoint=CheckpointConfig(every_steps=0),
        tracking=TrackingConfig(log_every_steps=100),
    )
    torch.manual_seed(0)
    rows = torch.randint(0, 64, (40, 9))
    model = DecoderLM(config.model, vocabulary_size=64, max_position_embeddings=8)
    world = DistributedContext.single()
    train_data, _ = create_dataloaders(config, world, train_dataset=[(row[:-1], row[1:]) for row in rows])
    optimizer, precision = build_optimizer(config.optim, model), Precision(dtype, world.device)
    parts = {"model": model, "optimizer": optimizer, "train_data": train_data, "precision": precision}
    return Trainer(config, world, **parts, callbacks=callbacks)


def reads_of(trainer: Trainer, patch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """What each step of a whole run reads."""
    reads = DeviceReads()
    reads.watch(trainer, patch)
    with reads:
        assert trainer.fit().progress.step == STEPS
    return {step: found for step, found in reads.by_step.items() if found}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_only_the_steps_that_are_logged_wait_for_the_device(dtype, monkeypatch):
    found = reads_of(a_trainer(dtype=dtype), monkeypatch)
    assert found.keys() == {1, STEPS}, found


def test_digests_of_the_weights_wait_for_the_device_in_a_thread_of_their_own(monkeypatch):
    monkeypatch.setattr(host_copy, "is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(PinnedMemory, "take", lambda memory, num_bytes: None)
    lines: list[dict[str, Any]] = []
    trainer = a_trainer()
    digests = WeightDigests(1, trainer.model, TrackerList())
    monkeypatch.setattr(digests, "log", lines.append)
    trainer.tracker, trainer.callbacks = digests, CallbackList([*trainer.callbacks.callbacks, digests])
    found = reads_of(trainer, monkeypatch)
    assert found.keys() == {1, STEPS}, found
    assert [line["step"] for line in lines if line["kind"] == "digest"] == [*range(1, STEPS + 1)]


def test_whatever_waits_in_a_step_is_noticed(monkeypatch):
    trainer = a_trainer()

    def loss_then_read(model: Any, batch: Any) -> Tensor:
        loss = model_loss(model, batch)
        if (name := ACT_AT.get(trainer.progress.step + 1)) is not None:
            READING[name](loss)
        return loss

    trainer.loss_function = loss_then_read
    found = reads_of(trainer, monkeypatch)
    assert [name for step, name in ACT_AT.items() if step not in found] == []


def test_whatever_reads_a_step_s_result_before_the_next_one_is_noticed(monkeypatch):
    class Reading:
        def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
            if result.step in ACT_AT:
                READING[ACT_AT[result.step]](result.loss_sum)

    trainer = a_trainer(Reading())
    found = reads_of(trainer, monkeypatch)
    assert [name for step, name in ACT_AT.items() if step not in found] == []


def test_waiting_for_the_last_step_counts_as_training_time_and_what_follows_does_not():
    trainer = a_trainer()
    is_paused: list[bool] = []
    trainer.divergence.drain = lambda: is_paused.append(trainer.throughput.paused.is_open)  # type: ignore[method-assign]
    with trainer.between_steps():
        is_paused.append(trainer.throughput.paused.is_open)
        with trainer.between_steps():  # such as validation within a callback's
            pass
        is_paused.append(trainer.throughput.paused.is_open)
    assert is_paused == [False, True, True]
    assert not trainer.throughput.paused.is_open
