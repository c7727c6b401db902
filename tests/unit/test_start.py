"""What a start does not wait for: imports that a run needs not, or not yet."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from dist_trainer.config.schema import OptimConfig
from dist_trainer.optim.registry import build_optimizer
from tests.unit.optim.test_registry import Small

STEP = """
import json, sys, torch
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


def test_a_step_imports_neither_torch_s_compiler_nor_transformers_models() -> None:
    found = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    loaded = set(json.loads(found.stdout))
    assert "torch.optim.adamw" in loaded
    assert not {"torch._dynamo", "sympy", "transformers", "datasets", "wandb"} & loaded


def test_adamw_without_the_compiler_is_torch_s_to_the_last_bit() -> None:
    models, optimizers = [], []
    for make in (build_optimizer, torch_s):
        torch.manual_seed(0)
        models.append(Small())
        optimizers.append(make(OptimConfig(name="adamw", learning_rate=0.1), models[-1]))
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.arange(5)).square().sum().backward()
            optimizer.step()
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def torch_s(config: OptimConfig, model: Small) -> torch.optim.Optimizer:
    decaying = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


GRADIENTS = """
import json, sys, torch, torch.distributed as dist
from types import SimpleNamespace
from dist_trainer.parallel.ddp import ddp
from dist_trainer.parallel.registry import gradient_sync, unwrap

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
torch.manual_seed(0)
model, rows = torch.nn.Linear(3, 3), torch.randn(2, 3)
wrapped = ddp(model, SimpleNamespace(world_size=2, device=torch.device("cpu")))
for last in (False, True):
    with gradient_sync(wrapped, enabled=last):
        wrapped(rows).square().sum().backward()
found = model.weight.grad.tolist()
model.zero_grad()
(2 * model(rows).square().sum()).backward()
modules = sorted(sys.modules)
graphs = []
torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(rows)
print(json.dumps([modules, unwrap(wrapped) is model, found == model.weight.grad.tolist(), len(graphs)]))
dist.destroy_process_group()
"""


def test_several_ranks_do_not_import_torch_s_compiler_either_and_it_works_once_it_is_wanted(tmp_path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", GRADIENTS, str(tmp_path / "meeting")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, is_unwrapped, same_gradients, graphs = json.loads(found.stdout)
    assert not {"torch._dynamo", "sympy"} & set(loaded)
    assert is_unwrapped
    assert same_gradients
    assert graphs == 1


OTHER_QUESTION = """
import torch
from dist_trainer.parallel.ddp import _compiler_that_leaves_all_as_it_is

with _compiler_that_leaves_all_as_it_is():
    assert torch._dynamo.utils.get_optimize_ddp_mode() == "no_optimization"
    assert torch._dynamo.utils.counters is not None
    assert torch._dynamo.config.optimize_ddp is True
    assert isinstance(torch._dynamo, type(torch))
assert isinstance(torch._dynamo, type(torch))
"""


def test_a_torch_that_asks_its_compiler_anything_else_gets_an_answer() -> None:
    subprocess.run([sys.executable, "-c", OTHER_QUESTION], check=True)
