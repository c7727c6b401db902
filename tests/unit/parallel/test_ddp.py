"""Distributed strategies, as far as one process shows them."""

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.parallel.registry import parallelize


@pytest.mark.parametrize("strategy", ["auto", "single", "ddp"])
def test_one_process_trains_the_model_itself(strategy):
    model = nn.Linear(1, 1)
    assert parallelize(model, DistributedContext.single(), strategy=strategy) is model


@pytest.mark.parametrize("name", ["_run_ddp_forward", "_inside_ddp_forward"])
def test_torch_has_what_the_data_parallel_loss_is_built_on(name):
    """Private: _run_ddp_forward calls the module, and the loss function in its place (parallel/ddp.py)."""
    assert hasattr(DistributedDataParallel, name)
