"""Finding a row of a table of variants (OPTIMIZERS, SCHEDULES, ...), or a function of the user's own."""

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


def resolve(table: Mapping[str, T], name: str, key: str) -> T:
    """The row `name` of `table`, or what "package.module:function" names; `key` is the config key to blame.

    Raises ConfigError with the nearest row where there is no such row, and with the cause where an import fails.
    """
    if name in table:
        return table[name]
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            is_missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or "-")
            remedy = f"; {_where_modules_are_found()}" if is_missing else ""
            raise ConfigError(f"{key}: {name!r} cannot be imported ({error}){remedy}") from error
        if not callable(found):
            raise ConfigError(f"{key}: {name!r} is {type_named(found)}, not a function")
        return cast(T, found)
    raise ConfigError(no_such_row(table, name, key))


def _where_modules_are_found() -> str:
    """The remedy: which folders Python looks in depends on how it was started."""
    here = Path.cwd()
    if any(Path(entry or ".").absolute() == here for entry in sys.path):
        return "its module must be in the current folder, installed, or in a folder on PYTHONPATH"
    start = f"PYTHONPATH={shlex.quote(str(here))}"
    return f"the current folder is not searched: set {start}, or start with `python -m dist_trainer.train`"


def no_such_row(rows: Iterable[str], name: str, key: str) -> str:
    """The message, with the nearest row."""
    known = list(rows)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? There are" if near else "there are"
    return f"{key}: no row {name!r}; {hint} {', '.join(known)}, or your own as package.module:function"


def build(table: Mapping[str, Callable[..., T]], name: str, key: str, *arguments: Any, kind: type[T]) -> T:
    """What the row that `name` means makes of `arguments`.

    Raises ConfigError as `resolve` does, and where a function of the user's own takes other arguments or does not give a
    `kind`. What goes wrong inside it comes out as it is.
    """
    row = resolve(table, name, key)
    try:
        inspect.signature(row).bind(*arguments)
    except TypeError as error:
        wanted = ", ".join(type(argument).__name__ for argument in arguments)
        raise ConfigError(f"{key}: {name!r} cannot be called with ({wanted}): {error}; see docs/extending.md") from error
    made = row(*arguments)
    if not isinstance(made, kind):
        raise ConfigError(f"{key}: {name!r} gave {type_named(made)}, not a {kind.__name__}; see docs/extending.md")
    return made
