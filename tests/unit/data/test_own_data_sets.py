"""Datasets of a user's own: pairs, dictionaries, and what is refused before training starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from dist_trainer.config.schema import BatchConfig, TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.loader import collate_pairs, create_dataloaders
from dist_trainer.errors import DataError
from dist_trainer.models.loss import model_loss

CONFIG = TrainingConfig(batch=BatchConfig(global_batch_size=2, micro_batch_size=2))
X, Y = torch.arange(6.0).view(2, 3), torch.tensor([1, -100])


def first_batch(dataset: Any) -> Batch:
    return next(iter(create_dataloaders(CONFIG, train_dataset=dataset).train))


@pytest.mark.parametrize(
    "items",
    [
        [(x, y) for x, y in zip(X, Y, strict=True)],
        [[x, y] for x, y in zip(X, Y, strict=True)],
        [{"inputs": x, "targets": y} for x, y in zip(X, Y, strict=True)],
        [(x.numpy(), int(y)) for x, y in zip(X, Y, strict=True)],
        TensorDataset(X, Y),
    ],
    ids=["pairs", "lists", "dictionaries", "arrays and numbers", "TensorDataset"],
)
def test_items_become_inputs_and_targets(items: Any) -> None:
    batch = first_batch(items)
    order = batch.input_ids[:, 0].argsort()
    assert torch.equal(batch.input_ids[order], X)
    assert torch.equal(batch.targets[order], Y)
    assert batch.num_targets() == 1


def test_inputs_may_be_dictionaries_and_lists_of_tensors() -> None:
    items = [({"x": x, "both": (x, 2 * x)}, y) for x, y in zip(X, Y, strict=True)]
    batch = collate_pairs(items)
    for same in (batch, batch.to(torch.device("cpu")), batch.shortened(0)):
        assert torch.equal(same.input_ids["x"], X)
        assert torch.equal(same.input_ids["both"][1], 2 * X)
    first = batch.first_sequences(1)
    assert torch.equal(first.input_ids["both"][0], X[:1])
    assert torch.equal(first.targets, Y[:1])


def test_a_dictionary_of_inputs_is_given_to_the_model_by_name() -> None:
    class Sum(nn.Module):
        def forward(self, *, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left + right

    parts = torch.randn(2, 3), torch.randn(2, 3)
    batch = Batch({"left": parts[0], "right": parts[1]}, torch.tensor([0, 2]))
    expected = nn.functional.cross_entropy(parts[0] + parts[1], batch.targets, reduction="sum")
    assert model_loss(Sum(), batch) == pytest.approx(float(expected))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        (
            [{"input_ids": X[0], "labels": X[0]}] * 4,
            r"train_dataset: its items are dictionaries with the keys input_ids, labels; give them the keys inputs and targets",
        ),
        ([{"x": X[0], "y": 1, "z": 2}] * 4, r"train_dataset: its items are dictionaries with the keys x, y, z;"),
        ([(X[0], X[0], 1)] * 4, r"train_dataset: its items are a tuple of 3; give \(inputs, targets\) pairs"),
        ([X] * 4, r"train_dataset: its items are a Tensor; give \(inputs, targets\) pairs"),
        ([(X[0], {"y": 1})] * 4, r"train_dataset: targets are a dict; give one tensor, array or number"),
        ([(X[0], "yes")] * 4, r"train_dataset: targets are a str; give one tensor"),
        (Stream(), r"train_dataset: a Stream has no __len__ or no __getitem__; give a map-style dataset"),
    ],
    ids=["Hugging Face's", "other keys", "triples", "tensors", "dictionary of targets", "text as target", "iterable"],
)
def test_what_cannot_be_trained_on_is_rejected_before_training_starts(dataset: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        create_dataloaders(CONFIG, train_dataset=dataset)


def test_a_validation_set_is_rejected_by_its_own_name() -> None:
    pairs = [(x, y) for x, y in zip(X, Y, strict=True)]
    with pytest.raises(DataError, match=r"^validation_dataset: its items"):
        create_dataloaders(CONFIG, train_dataset=pairs, validation_dataset=[{"a": 1}])
