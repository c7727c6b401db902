"""When a validation is due, and what it measures."""

import math
from fractions import Fraction

import pytest
import torch

from dist_trainer.config.schema import BatchConfig, ValidationConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.sampler import GlobalOrderSampler
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.training.precision import Precision
from dist_trainer.training.validation import ValidationResult, evaluate, validation_is_due


def due_steps(config: ValidationConfig, *, rows: int, global_batch_size: int, steps: int, max_steps: int = 10**9) -> list[int]:
    sampler = GlobalOrderSampler(range(rows), batch=BatchConfig(global_batch_size), rank=0, world_size=1, seed=0)
    return [
        step for step in range(steps + 1) if validation_is_due(config, step, max_steps=max_steps, epoch_of=sampler.epoch_of)
    ]


@pytest.mark.parametrize(
    "every", ["0.05", "0.1", "0.15", "0.2", "0.3", "0.5", "0.7", "1", "1.1", "2.3", "1/3", "1/7", "1/11", "1/49"]
)
@pytest.mark.parametrize("global_batch_size", [1, 3, 7, 12, 16])
def test_each_part_of_an_epoch_ends_in_the_step_that_reads_its_last_sequence(every, global_batch_size):
    config = ValidationConfig(every_steps=0, every_epochs=float(Fraction(every)))
    for rows in (49, 100, 720, 784, 1001):
        steps = math.ceil(5 * rows / global_batch_size)
        parts = range(1, math.floor(Fraction(steps * global_batch_size, rows) / Fraction(every)) + 1)
        expected = sorted({math.ceil(part * Fraction(every) * rows / global_batch_size) for part in parts})
        assert due_steps(config, rows=rows, global_batch_size=global_batch_size, steps=steps) == expected


def test_a_tenth_of_an_epoch_is_a_tenth_after_a_thousand_epochs_too():
    config = ValidationConfig(every_steps=0, every_epochs=0.1)
    sampler = GlobalOrderSampler(range(3562), batch=BatchConfig(16), rank=0, world_size=1, seed=0)
    last = math.ceil(1000 * 3562 / 16)
    due = [s for s in range(last - 445, last + 1) if validation_is_due(config, s, max_steps=10**9, epoch_of=sampler.epoch_of)]
    assert due == [math.ceil(Fraction(part, 10) * 3562 / 16) for part in range(9980, 10001)]


def test_by_steps_at_the_last_one_and_past_it_and_never_before_the_first():
    assert due_steps(ValidationConfig(every_steps=4), rows=64, global_batch_size=8, steps=11, max_steps=10) == [4, 8, 10, 11]
    assert due_steps(ValidationConfig(every_steps=0), rows=64, global_batch_size=8, steps=11, max_steps=10) == [10, 11]
    both = ValidationConfig(every_steps=3, every_epochs=0.5)
    assert due_steps(both, rows=64, global_batch_size=8, steps=9) == [3, 4, 6, 8, 9]


def test_the_mean_is_over_the_targets_of_all_batches_and_nothing_else():
    """Two batches of different length, one with padding; the loss of a target is its id."""
    inputs, ignored = torch.zeros(2, 3, dtype=torch.int64), -100
    batches = [
        Batch(inputs, torch.tensor([[1, 2, 3], [4, ignored, ignored]])),
        Batch(inputs[:1, :2], torch.tensor([[5, 6]])),
    ]
    result = evaluate(
        torch.nn.Identity(),
        batches,
        num_blocks=2,
        world=DistributedContext.single(),
        precision=Precision("fp32", torch.device("cpu")),
        loss_function=lambda model, batch: batch.targets.clamp(min=0).sum().float(),
    )
    assert result is not None
    assert (result.tokens, result.loss, result.bytes) == (6, 21 / 6, None)


def test_bits_per_byte_and_perplexity_follow_from_the_loss():
    result = ValidationResult(loss=2 * math.log(2), tokens=3, bytes=4, seconds=0.0)
    assert result.bits_per_byte == pytest.approx(1.5)
    assert result.perplexity == pytest.approx(4.0)
    assert ValidationResult(loss=710.0, tokens=3, bytes=0, seconds=0.0).metrics() == {
        "loss": 710.0,
        "perplexity": math.inf,
        "bits_per_byte": None,
        "tokens": 3,
        "bytes": 0,
    }
