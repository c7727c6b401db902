"""YAML files as dotted keys with the line each stands on; duplicate keys are noticed, and nothing is ever executed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_trainer.errors import ConfigError

MOST_NODES = 100_000
"""Keys and values of a file, aliases written out: a few lines of aliases of aliases can mean more than any memory holds."""


@dataclass(frozen=True)
class Assignment:
    """One key set to one value somewhere."""

    key: str
    value: Any
    where: str
    """`configs/mine.yaml:7`, or `command line`."""


def read_assignments(path: Path, sections: frozenset[str]) -> tuple[list[Assignment], list[str]]:
    """The keys of the file, those in `sections` joined with a dot, and what is wrong with the others.

    Wrong are a file that is missing, is no YAML or holds no mapping, a value that must not be in one, and a key that stands
    twice, be it as `model.dropout: 0` and as `dropout: 0` under `model:`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        return [], [f"--config {path}: cannot be read ({error.strerror})"]
    except UnicodeDecodeError:
        return [], [f"--config {path}: is not UTF-8 text"]
    try:
        root = _composed(text, str(path))
    except ConfigError as error:
        return [], [str(error)]
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [], [f"{path}:1: holds no mapping of keys to values, such as `seed: 1`"]
    found = list(_walk(root, path, "", sections, {}))
    return [one for one in found if isinstance(one, Assignment)], [one for one in found if isinstance(one, str)]


def load_yaml(text: str, name: str) -> Any:
    """The plain values that `text` says, which messages call `name`; None where it says none. Raises ConfigError."""
    root = _composed(text, name)
    return None if root is None else _plain(root, name)


def _composed(text: str, name: str) -> yaml.Node | None:
    """Raises ConfigError where `text` is no YAML, or more than any config."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: is not YAML ({error.problem or error.context})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: is not YAML ({error})") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: is nested too deeply; a config has sections, keys and values, no more levels") from error
    if root is not None and _size(root, {}) > MOST_NODES:
        raise ConfigError(
            f"{name}: holds more than {MOST_NODES:,} values where aliases (*name) are written out; a config has some hundred"
        )
    return root


def _walk(
    node: yaml.MappingNode, path: Path, prefix: str, sections: frozenset[str], first_lines: dict[str, int]
) -> Iterator[Assignment | str]:
    """Each assignment, or the sentence that says what is wrong with it."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        try:
            name = f"{prefix}{_plain(key_node, path)}"
            if name in first_lines:
                yield f"{path}:{line}: {name} stands here a second time (first on line {first_lines[name]})"
            first_lines.setdefault(name, line)
            if name in sections and isinstance(value_node, yaml.MappingNode):
                yield from _walk(value_node, path, f"{name}.", sections, first_lines)
            elif not (name in sections and _plain(value_node, path) is None):
                yield Assignment(name, _plain(value_node, path), f"{path}:{line}")
        except ConfigError as error:
            yield str(error)


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many nodes `node` stands for, aliases written out: without end where one names what it is a part of.

    `sizes` has those of nodes that are known.
    """
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # until its parts are known
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts if isinstance(part, yaml.Node))
    return sizes[id(node)]


def _plain(node: yaml.Node, path: Path | str) -> Any:
    """The value of a node, by the safe constructors alone: a tag for a Python object is an error."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {node.tag} is not allowed in a config") from error
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:  # by the kind of value
        raise ConfigError(
            f"{path}:{node.start_mark.line + 1}: {node.value!r:.80} cannot be read ({error}); quote it"
        ) from error
    finally:
        loader.dispose()
