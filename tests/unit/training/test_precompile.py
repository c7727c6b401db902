"""Where steps are rehearsed: where the first one would compile."""

from __future__ import annotations

import pytest
import torch

from dist_trainer.config.schema import BatchConfig, TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.loader import create_dataloaders
from dist_trainer.training.precompile import compiles_in_a_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PAIR = (torch.arange(8), torch.arange(8))
WHOLE, APART = Batch(*PAIR), Batch(*PAIR, document_ids=torch.zeros(8, dtype=torch.int32))


@pytest.mark.parametrize(
    ("row", "device", "compiles"),
    [(PAIR, GPU, False), (WHOLE, GPU, False), (APART, CPU, False), (APART, GPU, True)],
    ids=["pairs", "whole rows", "documents on a CPU", "documents on a GPU"],
)
def test_masked_documents_compile_on_a_gpu(row: object, device: torch.device, compiles: bool) -> None:
    config = TrainingConfig(batch=BatchConfig(global_batch_size=2))
    train = create_dataloaders(config, train_dataset=[row] * 4).train
    assert compiles_in_a_step(torch.nn.Linear(8, 1), train, device) is compiles


def test_a_compiled_model_does_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_trainer.training.precompile.is_compiled", lambda _: True)
    config = TrainingConfig(batch=BatchConfig(global_batch_size=2))
    train = create_dataloaders(config, train_dataset=[PAIR] * 4).train
    assert compiles_in_a_step(torch.nn.Linear(8, 1), train, CPU)
