"""What the header says of sums, and whether a resumed run is told that its curve changes."""

from __future__ import annotations

import logging
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dist_trainer.config.schema import BatchConfig, DistributedConfig, TrainingConfig
from dist_trainer.parallel import reduction
from dist_trainer.parallel.ddp import LossDDP
from dist_trainer.run.sameness import format_sums, log_changed_sums


def trainer(ranks: int, batch: BatchConfig, distributed: DistributedConfig | None = None, *, wraps: bool = True) -> Any:
    """As far as it is looked at."""
    config = TrainingConfig(batch=batch, distributed=distributed or DistributedConfig())
    model = LossDDP.__new__(LossDDP) if ranks > 1 and wraps else nn.Dropout(0.1)
    nn.Module.__init__(model)
    model.module, model.p = nn.Dropout(0.1), 0.1  # type: ignore[assignment]
    sampler = SimpleNamespace(micro_batch_size=batch.sequences_per_micro_batch(ranks))
    return SimpleNamespace(config=config, world=SimpleNamespace(world_size=ranks), sampler=sampler, model=model)


def metadata(ranks: int, batch: BatchConfig, **known: Any) -> dict[str, Any]:
    return {"world_size": ranks, "config": {"batch": asdict(batch)}, **known}


@pytest.mark.parametrize(
    ("ranks", "batch", "said"),
    [
        *((ranks, BatchConfig(16), "exact: the same bits on 1, 2, 4 or 8 ranks") for ranks in (1, 2, 8)),
        (16, BatchConfig(16), "exact: the same bits on 16 ranks; with --batch.micro_batch_size 1 on 1, 2, 4, 8 or 16 ranks"),
        (3, BatchConfig(24), "exact: the same bits on 3 ranks; with --batch.micro_batch_size 8 on 1 or 3 ranks"),
        (3, BatchConfig(24, 2), "exact: the same bits on 1, 2, 3, 4, 6 or 12 ranks"),
        (1, BatchConfig(7), "exact: the same bits on 1 rank"),
        (1, BatchConfig(480, 1), "exact: the same bits on any number of ranks that divides 480"),
    ],
)
def test_the_header_names_the_numbers_of_ranks_with_the_same_bits(ranks, batch, said):
    assert format_sums(trainer(ranks, batch)) == said
    if batch.micro_batch_size is None and "with" not in said and "1 rank" not in said:
        other = [BatchConfig(batch.global_batch_size).sequences_per_micro_batch(number) for number in (1, 2, 4, 8)]
        assert set(other) == {batch.sequences_per_micro_batch(ranks)}


def test_the_header_says_why_sums_are_not_exact():
    fast = format_sums(trainer(2, BatchConfig(16), DistributedConfig(reduction="fast")))
    assert fast == "fast: the last bits may depend on the number of ranks; distributed.reduction"
    own = format_sums(trainer(2, BatchConfig(16), DistributedConfig(strategy="mine:wrap"), wraps=False))
    assert own.startswith("fast: ")
    assert own.endswith("mine:wrap exchanges gradients itself (distributed.strategy)")
    assert format_sums(trainer(1, BatchConfig(16), DistributedConfig(strategy="mine:wrap"))).startswith("exact: ")


EXACT = {"micro_batch_size": 2, "reduction": "exact"}
RESUMED = {
    "other ranks": (4, BatchConfig(16), EXACT, logging.INFO, "resuming with 4 ranks (was 2): the same curve, to the last bit"),
    "null is an eighth": (2, BatchConfig(16, 2), EXACT, None, ""),
    "another micro-batch": (
        2,
        BatchConfig(16, 4),
        EXACT,
        logging.WARNING,
        "resuming with micro-batches of 4 sequences (was 2): another curve from here on, as sums are rounded differently and "
        "dropout masks differ; to stay on the same one, set --batch.micro_batch_size 2, on 1, 2, 4 or 8 ranks",
    ),
    "ranks that make another one": (
        16,
        BatchConfig(16),
        EXACT,
        logging.WARNING,
        "resuming with 16 ranks (was 2), micro-batches of 1 sequence (was 2): another curve from here on",
    ),
    "an earlier version, a rank's share": (2, BatchConfig(16), {}, logging.WARNING, "micro-batches of 2 sequences (was 8)"),
    "an earlier version": (
        2,
        BatchConfig(16, 8),
        {},
        logging.INFO,
        "resuming with reduction exact (was an earlier version's): the last bits of the curve differ from here on",
    ),
    "chosen": (
        2,
        BatchConfig(16, 2),
        EXACT | {"reduction": "fast"},
        logging.WARNING,
        "resuming with reduction exact (was fast): another curve from here on, by its last bits",
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_one_line_says_whether_a_resumed_run_stays_on_its_curve(case, caplog):
    """Started on two ranks."""
    ranks, batch, known, level, said = RESUMED[case]
    with caplog.at_level(logging.INFO, logger="dist_trainer"):
        log_changed_sums(trainer(ranks, batch), metadata(2, BatchConfig(16, batch.micro_batch_size), **known))
    assert [record.levelno for record in caplog.records] == ([] if level is None else [level])
    assert said in caplog.text


def test_a_large_model_on_more_ranks_than_its_sum_has_leaves_is_on_another_curve(monkeypatch, caplog):
    monkeypatch.setattr(reduction, "LARGE_MODEL", 0)
    now = trainer(64, BatchConfig(64, 1))
    now.model.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    assert format_sums(now) == "exact: the same bits on 64 ranks"
    with caplog.at_level(logging.INFO, logger="dist_trainer"):
        log_changed_sums(now, metadata(8, BatchConfig(64, 1), **EXACT | {"micro_batch_size": 1}))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "by its last bits; it is the same one on 1, 2, 4, 8, 16 or 32 ranks" in caplog.text


def test_without_dropout_a_run_of_an_earlier_version_stays_on_its_curve_but_for_rounding(caplog):
    now = trainer(1, BatchConfig(16))
    now.model = nn.Linear(1, 1)
    with caplog.at_level(logging.INFO, logger="dist_trainer"):
        log_changed_sums(now, metadata(2, BatchConfig(16)))
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert "1 rank (was 2), micro-batches of 2 sequences (was 8), reduction exact (was an earlier version's)" in caplog.text


def test_with_fast_sums_another_number_of_ranks_changes_the_last_bits(caplog):
    fast = DistributedConfig(reduction="fast")
    with caplog.at_level(logging.INFO, logger="dist_trainer"):
        log_changed_sums(trainer(4, BatchConfig(16), fast), metadata(2, BatchConfig(16), **EXACT | {"reduction": "fast"}))
    assert "the global batches stay the same, the last bits do not" in caplog.text


@pytest.mark.parametrize("unknown", [{}, {"world_size": 2}, {"world_size": 2, "config": {"batch": {}}}])
def test_a_checkpoint_that_does_not_tell_is_no_reason_for_a_line(unknown, caplog):
    log_changed_sums(trainer(4, BatchConfig(16)), unknown)
    assert not caplog.records
