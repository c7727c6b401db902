"""Reads YAML files as dotted keys with line numbers. Duplicate keys are errors, and nothing is ever executed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_trainer.errors import ConfigError

MAX_NODES = 100_000
"""Maximum number of keys and values in a file, with aliases expanded: a few lines of nested aliases can exceed any memory."""


@dataclass(frozen=True)
class Assignment:
    """One key set to one value somewhere."""

    key: str
    value: Any
    where: str
    """`configs/mine.yaml:7`, or `command line`."""


def read_assignments(path: Path, sections: Collection[str]) -> tuple[list[Assignment], list[str]]:
    """The keys of the file, those in `sections` joined with a dot, and a sentence for each problem.

    Problems are a file that is missing, is not YAML or is not a mapping, a value that is not allowed in a config, and a
    duplicate key, including `model.dropout: 0` together with `dropout: 0` under `model:`.
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
        return [], [f"{path}:1: is not a mapping of keys to values, such as `seed: 1`"]
    results = list(_walk(root, path, "", sections, {}))
    return [each for each in results if isinstance(each, Assignment)], [each for each in results if isinstance(each, str)]


def load_yaml(text: str, name: str) -> Any:
    """The plain values in `text`; messages call it `name`. None if it is empty. Raises ConfigError."""
    root = _composed(text, name)
    return None if root is None else _plain(root, name)


def _composed(text: str, name: str) -> yaml.Node | None:
    """Raises ConfigError if `text` is not YAML, or larger than any config could be."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: is not valid YAML ({error.problem or error.context})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: is not valid YAML ({error})") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: is nested too deeply; a config has only sections, keys and values") from error
    if root is not None and _size(root, {}) > MAX_NODES:
        raise ConfigError(
            f"{name}: holds more than {MAX_NODES:,} values with aliases (*name) expanded; a config has about a hundred"
        )
    return root


def _walk(
    node: yaml.MappingNode, path: Path, prefix: str, sections: Collection[str], first_lines: dict[str, int]
) -> Iterator[Assignment | str]:
    """Each assignment, or a sentence that says what is wrong with it."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        try:
            name = f"{prefix}{_plain(key_node, path)}"
            if name in first_lines:
                yield f"{path}:{line}: duplicate key {name} (first set on line {first_lines[name]})"
            first_lines.setdefault(name, line)
            if name in sections and isinstance(value_node, yaml.MappingNode):
                yield from _walk(value_node, path, f"{name}.", sections, first_lines)
            elif not (name in sections and _plain(value_node, path) is None):
                yield Assignment(name, _plain(value_node, path), f"{path}:{line}")
        except ConfigError as error:
            yield str(error)


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """The number of nodes in `node` with aliases expanded; infinite if an alias refers to a node that contains it.

    `sizes`: the known sizes of nodes.
    """
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # until its parts are known
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts if isinstance(part, yaml.Node))
    return sizes[id(node)]


def _plain(node: yaml.Node, path: Path | str) -> Any:
    """The value of a node, using only safe constructors: a tag for a Python object is an error."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {node.tag} is not allowed in a config") from error
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{path}:{node.start_mark.line + 1}: {node.value!r:.80} cannot be read ({error}); quote it"
        ) from error
    finally:
        loader.dispose()
