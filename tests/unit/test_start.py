"""Imports that a run does not need, or not yet."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import dist_trainer

STEP = """
import json, sys, torch
import dist_trainer.run.lifecycle
from dist_trainer.config.schema import ModelConfig, OptimConfig
from dist_trainer.models.registry import ModelContext, build_model
from dist_trainer.optim.registry import build_optimizer
from dist_trainer.training.precision import Precision

model = build_model(ModelConfig(), ModelContext(64, 32, 0, torch.device("cpu")))
optimizer = build_optimizer(OptimConfig(), model)
precision = Precision("fp32", torch.device("cpu"))
precision.backward(model(torch.arange(8)[None], torch.arange(8)[None]), 0.5)
precision.step(optimizer, torch.ones(()))
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad()
print(json.dumps(sorted(sys.modules)))
"""


def test_the_command_s_modules_and_a_step_import_neither_transformers_nor_datasets_nor_wandb() -> None:
    found = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    loaded = set(json.loads(found.stdout))
    assert "torch.optim.adamw" in loaded
    assert not {"transformers", "datasets", "wandb"} & loaded


@pytest.mark.parametrize(("old", "new"), [("World", "init_distributed"), ("weights_writer", "make_weight_saver")])
def test_a_renamed_name_ends_in_an_error_that_gives_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ImportError, match=rf"dist_trainer\.{old} was renamed to .*{new}"):
        exec(f"from dist_trainer import {old}")
    assert new in dist_trainer.__all__
