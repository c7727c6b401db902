"""The keys there are: their types, what is said of each, and which one a misspelt key may mean."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from dist_trainer.config.aliases import RENAMED_KEYS, key_called, value_called, why_no_key
from dist_trainer.config.schema import TrainingConfig

PATH_KEYS = ("data.dataset", "data.validation_dataset", "data.tokenizer", "data.chat_template", "data.cache_dir")
PATH_KEYS += ("model.init_from", "output_dir", "checkpoint.resume")
"""Keys whose value may be a file or a folder; `~` in it is the home folder."""


@cache
def leaf_types() -> dict[str, Any]:
    """Each dotted key's type."""
    leaves: dict[str, Any] = {}
    for name, kind in get_type_hints(TrainingConfig).items():
        if dataclasses.is_dataclass(kind):
            leaves.update({f"{name}.{inner}": hint for inner, hint in get_type_hints(kind).items()})
        else:
            leaves[name] = kind
    return leaves


@cache
def sections() -> frozenset[str]:
    """Names of the sections."""
    return frozenset(key.split(".")[0] for key in leaf_types() if "." in key)


def section_classes() -> dict[str, type]:
    """The dataclass of each section, in their order; first that of the keys outside of any, under an empty name."""
    kinds = get_type_hints(TrainingConfig)
    return {"": TrainingConfig, **{name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}}


def keys_of(section: str) -> list[str]:
    """The dotted keys of a section; those outside of any for an empty name."""
    return [key for key in leaf_types() if key.rpartition(".")[0] == section]


def sentences(section: type) -> dict[str, str]:
    """What is said under each key of a section's dataclass."""
    import docstring_parser  # a run needs none of it

    found = docstring_parser.parse_from_object(section).params
    return {param.arg_name: " ".join((param.description or "").split()) for param in found}


@cache
def sentences_by_key() -> dict[str, str]:
    """What is said of each dotted key."""
    return {
        f"{name}.{key}" if name else key: text
        for name, section in section_classes().items()
        for key, text in sentences(section).items()
    }


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def no_such_key(key: str) -> str:
    """The complaint, with the key that may be meant."""
    if key in RENAMED_KEYS:
        return f"no such key; it was renamed to {RENAMED_KEYS[key]}"
    known = list(leaf_types())
    last = key.rsplit(".", 1)[-1].replace("-", "_")
    if (message := why_no_key(last)) is not None:
        return message
    elsewhere = [found for found in (key_called(last),) if found is not None]
    near = (
        (elsewhere if "." not in key else [])
        or [name for name in known if name.rsplit(".", 1)[-1] == last]
        or elsewhere
        or [name for name in known if _initials(name) == last]
        or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        or difflib.get_close_matches(last, known, n=1, cutoff=0.5)
    )
    return f"no such key; did you mean {near[0]}?" if near else "no such key; --help all lists them all"


def near_value(value: Any, kind: Any) -> str:
    """`; did you mean bf16?` if one of the few values of a key of this type may be meant; otherwise ""."""
    values = [str(one) for option in options_of(kind) if get_origin(option) is Literal for one in get_args(option)]
    written = str(value)
    near = [found for found in (value_called(written, values),) if found is not None]
    near = near or difflib.get_close_matches(written.lower(), values, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _initials(key: str) -> str:
    """The letters by which people call a key: "lr" for optim.learning_rate."""
    return "".join(word[0] for word in key.rsplit(".", 1)[-1].split("_"))


def in_words(kind: Any) -> str:
    """What a value of this type is."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text (put it in quotes)"}
    words = []
    for option in options_of(kind):
        if get_origin(option) is Literal:
            values = ", ".join(map(str, get_args(option)))
            words.append(f"one of {values}" if len(get_args(option)) > 1 else values)
        elif get_origin(option) is tuple:
            words.append(f"a list of {len(get_args(option))} numbers, such as [0.9, 0.95]")
        else:
            words.append(names.get(option, str(option)))
    return " or ".join([*words, "null"] if may_be_null(kind) else words)


def as_written(value: Any) -> str:
    """A value as a config file has it: null, true, [0.9, 0.95]; text in quotes."""
    return repr(value) if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]


def options_of(kind: Any) -> list[Any]:
    """The types of a union, without None; else the type alone."""
    is_union = get_origin(kind) is Union or type(kind).__name__ == "UnionType"
    return [option for option in get_args(kind) if option is not type(None)] if is_union else [kind]


def may_be_null(kind: Any) -> bool:
    """Whether a key of this type may be null."""
    return type(None) in get_args(kind)
