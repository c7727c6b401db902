"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from dist_trainer.errors import ConfigError


def user_path(name: str) -> Path:
    """The path `name`, with `~` or `~user` at its beginning replaced by the home folder. A shell does that for separate words
    only, neither in `--key=~/folder` nor in a YAML file.

    Raises ConfigError if that home folder is not known.
    """
    expanded = os.path.expanduser(name)
    if name.startswith("~") and expanded == name:
        raise ConfigError(f"{name!r}: the home folder {Path(name).parts[0]} is not known; write the path in full")
    return Path(expanded)


def is_same_path(first: object, second: object) -> bool:
    """Whether two values of a config are paths, as users write them, that lead to the same place."""
    if not (isinstance(first, str) and isinstance(second, str)):
        return False
    return os.path.realpath(os.path.expanduser(first)) == os.path.realpath(os.path.expanduser(second))
