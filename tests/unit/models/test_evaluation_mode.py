"""Each module is in its own mode again after an evaluation."""

from __future__ import annotations

import pytest
from torch import nn

from dist_trainer.models.evaluation_mode import evaluation_mode


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_were_in_another_mode_than_the_model_are_again(training: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2)), nn.Dropout(0.1)).train(training)
    model[1].train(not training)
    model[1][1].train(training)
    before = modes(model)
    with evaluation_mode(model):
        assert not any(modes(model))
    assert modes(model) == before


class MergesOnEvaluation(nn.Module):
    """As adapters do whose `train` adds them to the weights, and takes them out again."""

    merged = False

    def train(self, mode: bool = True) -> MergesOnEvaluation:
        self.merged = not mode
        return super().train(mode)


def test_what_a_module_does_when_it_changes_mode_is_done() -> None:
    model = nn.Sequential(MergesOnEvaluation(), nn.Linear(1, 1)).train()
    with evaluation_mode(model):
        assert model[0].merged
    assert not model[0].merged
