"""The keys, with their types and descriptions, as defined in config/schema.py."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any, get_type_hints

from dist_trainer.config.schema import TrainingConfig
from dist_trainer.config.values import as_yaml

PATH_KEYS = ("data.dataset", "data.validation_dataset", "data.tokenizer", "data.chat_template", "data.cache_dir")
PATH_KEYS += ("model.init_from", "output_dir", "checkpoint.resume")
"""Keys whose value may be a file or a folder; a leading `~` is the home folder."""


@cache
def key_types() -> dict[str, Any]:
    """The type of each dotted key."""
    types: dict[str, Any] = {}
    for section, kind in section_classes().items():
        for name, hint in get_type_hints(kind).items():
            if not dataclasses.is_dataclass(hint):
                types[f"{section}.{name}" if section else name] = hint
    return types


@cache
def section_classes() -> dict[str, type]:
    """The dataclass of each section, in order; first the one for keys outside all sections, under an empty name."""
    kinds = get_type_hints(TrainingConfig)
    return {"": TrainingConfig, **{name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}}


def section_names() -> list[str]:
    """The names of the sections, in order."""
    return [name for name in section_classes() if name]


def keys_of(section: str) -> list[str]:
    """The dotted keys of a section; for an empty name, the keys outside all sections."""
    return [key for key in key_types() if key.rpartition(".")[0] == section]


@cache
def descriptions() -> dict[str, str]:
    """The string under each field in config/schema.py, by dotted key."""
    texts: dict[str, str] = {}
    for section, kind in section_classes().items():
        [definition] = ast.parse(inspect.getsource(kind)).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name = ast.unparse(field.target)
                texts[f"{section}.{name}" if section else name] = " ".join(ast.literal_eval(text.value).split())
    return texts


def format_default(key: str) -> str:
    """The default of a dotted key, as YAML."""
    section, _, name = key.rpartition(".")
    return as_yaml(getattr(section_classes()[section](), name))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
