"""Registries (OPTIMIZERS, SCHEDULES, ...): looks up and builds their entries by name, and users' own functions."""

from __future__ import annotations

import difflib
import importlib
import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from dist_trainer.errors import ConfigError, type_named

T = TypeVar("T")

ENTRY_NAMES: dict[str, tuple[str, ...]] = {
    "model.name": ("decoder_lm", "hf"),
    "optim.name": ("auto", "adamw", "muon"),
    "schedule.name": ("cosine", "linear", "constant", "wsd"),
    "distributed.strategy": ("auto", "single", "ddp"),
    "distributed.reduction": ("exact", "fast"),
}
"""Entry names by config key; `auto` chooses among the others. Configs are checked against these, as the registries themselves
import torch. A test keeps the two equal.
"""


def resolve(registry: Mapping[str, T], name: str, key: str) -> T:
    """The entry `name` of `registry`, or what "package.module:function" names; `key` is the config key to blame.

    Raises ConfigError with the nearest name if there is no such entry, and with the cause if an import fails.
    """
    if name in registry:
        return registry[name]
    if ":" not in name:
        raise ConfigError(unknown_entry_message(registry, name, key))
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        is_missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or "-")
        remedy = f"; {_where_modules_are_found()}" if is_missing else ""
        raise ConfigError(f"{key}: {name!r} cannot be imported ({error}){remedy}") from error
    if not callable(function):
        raise ConfigError(f"{key}: {name!r} is {type_named(function)}, not a function")
    return cast(T, function)


def _where_modules_are_found() -> str:
    """The remedy. Which folders Python searches depends on how it was started."""
    here = Path.cwd()
    if any(Path(entry or ".").absolute() == here for entry in sys.path):
        return "its module must be in the current folder, installed, or in a folder on PYTHONPATH"
    start = f"PYTHONPATH={shlex.quote(str(here))}"
    return f"the current folder is not searched: set {start}, or start with `python -m dist_trainer.train`"


def unknown_entry_message(names: Iterable[str], name: str, key: str) -> str:
    """The message for a `name` that is not one of the `names`, with the nearest of them."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? Choose" if near else "choose"
    return f"{key}: unknown name {name!r}; {hint} from {', '.join(known)}, or use your own as package.module:function"


def build(registry: Mapping[str, Callable[..., T]], name: str, key: str, *arguments: Any, kind: type[T]) -> T:
    """Call the entry `name` with `arguments`, and return its result.

    Raises ConfigError as `resolve` does, and if a user's function takes other arguments or does not return a `kind`. An error
    inside it is not caught.
    """
    entry = resolve(registry, name, key)
    try:
        inspect.signature(entry).bind(*arguments)
    except TypeError as error:
        wanted = ", ".join(type(argument).__name__ for argument in arguments)
        raise ConfigError(f"{key}: {name!r} cannot be called with ({wanted}): {error}; see docs/extending.md") from error
    built = entry(*arguments)
    if not isinstance(built, kind):
        raise ConfigError(f"{key}: {name!r} returned {type_named(built)}, not a {kind.__name__}; see docs/extending.md")
    return built
