"""What an optimizer keeps comes back from a checkpoint as it was, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_trainer.checkpoint.optimizer_state import (
    GROUPS,
    OPTIMIZER_FILE,
    STATE_FILE,
    FirstStepCheck,
    check_is_savable,
    group_values,
    restore_optimizer,
    state_tensors,
    state_values,
)
from dist_trainer.config.schema import OptimConfig
from dist_trainer.errors import CheckpointError, ConfigError
from dist_trainer.optim.registry import OPTIMIZERS


class KeepsStateInGroups(Optimizer):
    """As Prodigy, D-Adaptation and schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        settings = {"lr": lr, "betas": (0.9, 0.99), "growth_rate": float("inf"), "d": 1e-6, "k": 0, "train_mode": False}
        super().__init__(params, settings)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["d"], group["k"], group["train_mode"] = group["d"] * 1.7, group["k"] + 1, True
            group["numerator"] = group.get("numerator", torch.zeros(())) + 0.3  # made by the first step
            for parameter in group["params"]:
                state = self.state[parameter]
                state["z"] = state.get("z", torch.zeros(parameter.shape, dtype=torch.float64)) + group["d"]
                state["flags"] = torch.ones(3, dtype=torch.uint8)
                state["count"] = group["k"]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 2)


def save(optimizer: Optimizer, model: nn.Module, folder: Path, *, groups: bool = True) -> dict[str, Any]:
    save_file(state_tensors(optimizer, model), folder / OPTIMIZER_FILE)
    saved = {"optimizer_values": state_values(optimizer, model)} | ({GROUPS: group_values(optimizer)} if groups else {})
    (folder / STATE_FILE).write_text(json.dumps(saved))
    return json.loads((folder / STATE_FILE).read_text())


def two_groups(model: nn.Linear) -> KeepsStateInGroups:
    return KeepsStateInGroups([{"params": [model.weight], "d": 1e-3}, {"params": [model.bias], "lr": 0.5}])


def test_state_in_groups_and_the_formats_of_tensors_come_back(tmp_path: Path) -> None:
    model = linear()
    optimizer = two_groups(model)
    for _ in range(3):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1  # what the schedule has made of it
    saved = save(optimizer, model, tmp_path)
    again = two_groups(model)
    restore_optimizer(again, model, tmp_path, saved)
    assert [group["lr"] for group in again.param_groups] == [1.0, 0.5]
    for before, after in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert {**before, "lr": None, "params": None} == {**after, "lr": None, "params": None}
        assert isinstance(after["betas"], tuple)
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            found = again.state[parameter][key]
            assert type(found) is type(value)
            assert not isinstance(value, Tensor) or (found.dtype == value.dtype and torch.equal(found, value))
    optimizer.step(), again.step()
    assert again.param_groups[1]["d"] == optimizer.param_groups[1]["d"]


def test_a_checkpoint_of_other_groups_is_rejected(tmp_path: Path) -> None:
    model = linear()
    saved = save(two_groups(model), model, tmp_path)
    with pytest.raises(CheckpointError, match="has 2 parameter groups, the optimizer 1; build it as it was"):
        restore_optimizer(KeepsStateInGroups(model.parameters()), model, tmp_path, saved)


@pytest.mark.parametrize("name", ["adamw", "muon", "torch's", "group state"])
def test_an_old_checkpoint_without_groups_resumes_if_that_is_exact(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(linear(), linear())

    def make() -> Optimizer:
        if name in OPTIMIZERS:
            return OPTIMIZERS[name](OptimConfig(), model)
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if name == "torch's" else two_groups(model[0])

    def step(optimizer: Optimizer) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    first = make()
    step(first)
    saved = save(first, model, tmp_path, groups=False)
    again = make()
    restore_optimizer(again, model, tmp_path, saved)
    check = FirstStepCheck(again, model, saves=True, resumed=tmp_path)
    step(again)
    if name == "group state":
        with pytest.raises(
            CheckpointError, match=r"keeps in its parameter groups \(d, k, train_mode\), so it cannot be resumed"
        ):
            check.after_step()
    else:
        check.after_step()
    check.after_step()  # later steps are not looked at


class Refused(KeepsStateInGroups):
    """With one thing that checkpoints cannot hold."""

    def __init__(self, model: nn.Module, what: str) -> None:
        super().__init__([*model.parameters(), nn.Parameter(torch.ones(7))] if what == "parameter" else model.parameters())
        self.what = what
        if what == "group":
            self.param_groups[0]["filter"] = print

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        if self.what == "state":
            self.state[self.param_groups[0]["params"][0]]["factors"] = [torch.ones(2)]
        if self.what == "global":
            self.state["steps"] = 1  # type: ignore[index]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"queue": []} if self.what == "top" else {})


@pytest.mark.parametrize(
    ("what", "sentence", "is_seen_before_the_step"),
    [
        (
            "group",
            "optimizer: parameter group 0 of Refused has 'filter', a builtin_function_or_method, which cannot be saved",
            True,
        ),
        ("parameter", r"optimizer: group 0 of Refused has a parameter of shape \(7,\) that is not one of the model's", True),
        ("top", "optimizer: the state_dict of Refused has 'queue' next to state and param_groups", True),
        ("state", "optimizer: the state of Refused has 'factors', a list, which cannot be saved", False),
        ("global", "optimizer: Refused has state under 'steps', which is not a parameter of the model", False),
    ],
)
def test_what_a_checkpoint_would_lose_is_rejected_by_name(what: str, sentence: str, is_seen_before_the_step: bool) -> None:
    model = linear()
    optimizer = Refused(model, what)
    FirstStepCheck(optimizer, model, saves=False, resumed=None).after_step()  # nothing is saved: nothing is lost
    if is_seen_before_the_step:
        with pytest.raises(ConfigError, match=sentence):
            check_is_savable(optimizer, model)
        return
    check = FirstStepCheck(optimizer, model, saves=True, resumed=None)
    optimizer.step()
    with pytest.raises(ConfigError, match=sentence):
        check.after_step()


def test_a_model_with_state_that_is_no_tensor_is_rejected_by_name() -> None:
    class Counter(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    model = nn.Sequential(Counter(2, 2))
    with pytest.raises(
        ConfigError, match=r"model: its state_dict has '0\._extra_state', a dict, which cannot be saved; keep it as a"
    ):
        check_is_savable(torch.optim.SGD(model.parameters(), lr=0.1), model)
