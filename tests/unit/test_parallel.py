"""How a model is shared, as far as one process shows it."""

import pytest
from torch import nn

from dist_trainer.distributed.world import World
from dist_trainer.parallel.registry import parallelize


@pytest.mark.parametrize("strategy", ["auto", "single", "ddp"])
def test_one_process_trains_the_model_as_it_stands(strategy):
    model = nn.Linear(1, 1)
    assert parallelize(model, World.single(), strategy=strategy) is model
