"""Saves and loads an optimizer's state in a checkpoint's files: tensors as safetensors, numbers and text as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_trainer.errors import CheckpointError, ConfigError, type_named
from dist_trainer.storage.manifest import read_json

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
GROUPS = "optimizer_groups"
"""Key of the groups' values in a checkpoint's JSON; missing if an early version of dist_trainer wrote it."""
SEPARATOR = "::"
_GROUP = f"param_groups{SEPARATOR}"
_TRAINING_WEIGHT = "training_weight"
_NOT_STATE = ("params", "lr", "initial_lr")
"""Entries of a group that are not saved: its parameters, and learning rates, which depend on config and step."""


def state_tensors(
    optimizer: Optimizer, model: nn.Module, training_weights: Mapping[nn.Parameter, Tensor] | None = None
) -> dict[str, Tensor]:
    """`parameter::entry` → tensor of its state, and `param_groups::index::entry` → tensor of a group.

    `training_weights`: the weights in training of parameters that are saved with other values (see `take_snapshot`).
    """
    state = {
        f"{name}{SEPARATOR}{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    groups = {
        f"{_GROUP}{index}{SEPARATOR}{key}": value
        for index, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if isinstance(value, Tensor) and key not in _NOT_STATE
    }
    own = {name: training_weights[p] for name, p in model.named_parameters() if training_weights and p in training_weights}
    return {**state, **groups, **{f"{name}{SEPARATOR}{_TRAINING_WEIGHT}": value for name, value in own.items()}}


def state_values(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """`parameter::entry` → number or text in its state."""
    return {
        f"{name}{SEPARATOR}{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if not isinstance(value, Tensor)
    }


def group_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Numbers and text of each parameter group: settings, and state that some optimizers keep there, such as Prodigy's `d`."""
    return [
        {key: _copy(value) for key, value in group.items() if key not in _NOT_STATE and not isinstance(value, Tensor)}
        for group in optimizer.param_groups
    ]


def check_is_savable(optimizer: Optimizer, model: nn.Module) -> None:
    """Raises ConfigError for any state of `optimizer` or `model` that a checkpoint would lose, by name."""
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ConfigError(
                f"model: its state_dict has {key!r}, a {kind}, which cannot be saved; keep it as a buffer, a tensor"
            )
    kind, own = type(optimizer).__name__, {id(parameter) for parameter in model.parameters()}
    for key in optimizer.state_dict():
        if key not in ("state", "param_groups"):
            raise ConfigError(f"optimizer: the state_dict of {kind} has {key!r} next to state and param_groups; {_REMEDY}")
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in own:
                raise ConfigError(
                    f"optimizer: group {index} of {kind} has a parameter of shape {tuple(parameter.shape)} that is not one of "
                    "the model's; make it a parameter of the model, which is saved, and whose gradients all ranks share"
                )
        _check_entries(f"parameter group {index} of {kind}", group)
    for parameter, state in optimizer.state.items():
        if id(parameter) not in own:
            raise ConfigError(
                f"optimizer: {kind} has state under {parameter!r}, which is not a parameter of the model; {_REMEDY}"
            )
        _check_entries(f"the state of {kind}", state)


def restore_optimizer(
    optimizer: Optimizer, model: nn.Module, folder: Path, saved: Mapping[str, Any]
) -> dict[nn.Parameter, Tensor]:
    """Load the state in `folder` for the parameters of `model` into `optimizer`, on their devices; `saved` is its JSON part.

    Returns the training weights of those parameters that were saved with their evaluation weights. Learning rates keep their
    values, and so do the parameter groups if the checkpoint has none of theirs. Raises CheckpointError.
    """
    try:
        tensors: dict[str, Any] = dict(load_file(folder / OPTIMIZER_FILE))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / OPTIMIZER_FILE} cannot be read: {error}") from error
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **saved["optimizer_values"]}.items():
        name, _, entry = key.rpartition(SEPARATOR)
        by_name.setdefault(name, {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    values = saved.get(GROUPS)
    if values is not None and len(values) != len(groups):
        raise CheckpointError(f"{folder} has {len(values)} parameter groups, the optimizer {len(groups)}; build it as it was")
    for index, group in enumerate(groups):
        device = next((parameter.device for parameter in optimizer.param_groups[index]["params"]), None)
        for key, value in {**(values[index] if values else {}), **by_name.pop(f"{_GROUP}{index}", {})}.items():
            group[key] = _as_before(value, group.get(key), device)

    trained = {name: entries.pop(_TRAINING_WEIGHT) for name, entries in by_name.items() if _TRAINING_WEIGHT in entries}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    if missing := [name for name in by_name if name not in ordered]:
        raise CheckpointError(f"{folder / OPTIMIZER_FILE} has state for {missing[0]}, which the optimizer does not know")
    state = {index: by_name[name] for index, name in enumerate(ordered) if by_name.get(name)}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _restore_dtypes(optimizer, names, by_name)
    return {parameter: trained[name].view_as(parameter) for name, parameter in model.named_parameters() if name in trained}


class FirstStepCheck:
    """Checks, after the first step, that a checkpoint can hold the optimizer's state: many create it in that step."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, *, saves: bool, resumed: Path | None) -> None:
        """`saves`: whether checkpoints will be saved; `resumed`: the one that was resumed from."""
        self._optimizer, self._model, self._saves = optimizer, model, saves
        self._without_groups = resumed if resumed is not None and GROUPS not in read_json(resumed / STATE_FILE) else None
        self._before: list[dict[str, Any]] | None = group_values(optimizer)

    def after_step(self) -> None:
        """Raises ConfigError for state that cannot be saved, CheckpointError if the checkpoint had no state of the groups."""
        before, self._before = self._before, None
        if before is None:
            return
        if self._saves:
            check_is_savable(self._optimizer, self._model)
        now = group_values(self._optimizer)
        changed = sorted({key for a, b in zip(before, now, strict=True) for key in b if a.get(key) != b[key]})
        if self._without_groups is not None and changed:
            kind = type(self._optimizer).__name__
            raise CheckpointError(
                f"{self._without_groups} was saved by an older version, without what {kind} keeps in its parameter groups "
                f"({', '.join(changed)}), so it cannot be resumed exactly; start over with --checkpoint.resume never, or from "
                "its weights alone (--model.init_from)"
            )


_REMEDY = "checkpoints hold tensors, numbers, text and lists of these, in state of parameters and in param_groups: keep it so"


def _check_entries(where: str, entries: Mapping[str, Any]) -> None:
    for key, value in entries.items():
        if key != "params" and not (isinstance(value, Tensor) or _is_plain(value)):
            raise ConfigError(f"optimizer: {where} has {key!r}, {type_named(value)}, which cannot be saved; {_REMEDY}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _copy(value: Any) -> Any:
    return [_copy(part) for part in value] if isinstance(value, list | tuple) else value


def _as_before(value: Any, current: Any, device: torch.device | None) -> Any:
    """`value` from a file, of the type and on the device of `current`."""
    if isinstance(value, Tensor):
        return value.to(current.device if isinstance(current, Tensor) else device)
    return tuple(value) if isinstance(current, tuple) and isinstance(value, list) else value


def _restore_dtypes(optimizer: Optimizer, names: Mapping[int, str], by_name: Mapping[str, Mapping[str, Any]]) -> None:
    """torch casts state to its parameter's dtype on loading; restore the dtype it had in the run that saved it."""
    for parameter, state in optimizer.state.items():
        for key, value in by_name.get(names[id(parameter)], {}).items():
            if isinstance(value, Tensor) and isinstance(state[key], Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)
