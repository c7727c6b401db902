"""YAML files as dotted keys with the line each stands on; duplicate keys are noticed, and nothing is ever executed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_trainer.errors import ConfigError


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
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        return [], [f"{path}{line}: is not YAML ({error.problem or error.context})"]
    except yaml.YAMLError as error:
        return [], [f"{path}: is not YAML ({error})"]
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [], [f"{path}:1: holds no mapping of keys to values, such as `seed: 1`"]
    found = list(_walk(root, path, "", sections, {}))
    return [one for one in found if isinstance(one, Assignment)], [one for one in found if isinstance(one, str)]


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


def _plain(node: yaml.Node, path: Path) -> Any:
    """The value of a node, by the safe constructors alone: a tag for a Python object is an error."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {node.tag} is not allowed in a config") from error
    except ValueError as error:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {node.value!r} cannot be read ({error}); quote it") from error
    finally:
        loader.dispose()
