"""From files and arguments to one TrainingConfig, with all problems in one message; and back to YAML.

jsonargparse checks types and renders the help, here and nowhere else. Where each value stands is tracked beside it, since
a message that names no line sends the reader searching.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from dist_trainer.config.initial_model import keys_in_use, keys_that_follow
from dist_trainer.config.rules import broken_rules
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.config.sweep_run import in_folder_of_its_own
from dist_trainer.config.yaml_lines import Assignment, read_assignments
from dist_trainer.errors import ConfigError, RefusedError
from dist_trainer.place import place_of_this_process

PROGRAM = "python -m dist_trainer.train"
COMMAND_LINE = "command line"
_FLAGS = ("--help", "-h", "--print_config")


@dataclass(frozen=True)
class Arguments:
    """A command line, taken apart."""

    configs: list[str] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def load_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """The config that the command line `argv` (default: this process's) asks for; later files and arguments win.

    `--help` and `--print_config` print and raise SystemExit(0). Raises ConfigError with every problem found.
    """
    arguments = _take_apart(sys.argv[1:] if argv is None else argv)
    if arguments.flags & {"--help", "-h"}:
        print(_help())
        raise SystemExit(0)
    config = _resolve(arguments)
    if "--print_config" in arguments.flags:
        print(dump_config(config), end="")
        raise SystemExit(0)
    return config


def keys_given(argv: Sequence[str]) -> set[str]:
    """The dotted keys that the command line `argv` sets, itself or in its --config files, as far as these can be read."""
    arguments = _take_apart(argv)
    in_files = [assignment for name in arguments.configs for assignment in read_assignments(Path(name), sections())[0]]
    return {assignment.key for assignment in (*in_files, *arguments.assignments)}


def validated(config: TrainingConfig) -> TrainingConfig:
    """`config` itself. Raises ConfigError with every rule it breaks; for configs made in Python."""
    _raise_all(broken_rules(config))
    return config


def dump_config(config: TrainingConfig) -> str:
    """YAML that loads to the same config."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=120)


def as_dict(config: TrainingConfig) -> dict[str, Any]:
    """Nested dictionaries of plain values; without the keys of the model section that have no meaning for its model."""
    plain = dataclasses.asdict(config)
    plain["model"] = {name: value for name, value in plain["model"].items() if name in keys_in_use(config)}
    plain["optim"]["betas"] = list(config.optim.betas)
    return plain


def config_differences(before: TrainingConfig | Mapping[str, Any], now: TrainingConfig) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of each dotted key that differs; a key that is missing before has its default."""
    earlier = _flatten(before if isinstance(before, Mapping) else as_dict(before))
    defaults, current = _flatten(as_dict(TrainingConfig())), _flatten(as_dict(now))
    both = [(key, earlier.get(key, defaults.get(key)), value) for key, value in current.items()]
    return [difference for difference in both if difference[1] != difference[2]]


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


# ------------------------------------------------------------------------------------------------ the parts


def _take_apart(argv: Sequence[str]) -> Arguments:
    arguments = Arguments()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in _FLAGS:
            arguments.flags.add(word)
            continue
        if not word.startswith("--"):
            arguments.problems.append(f"{COMMAND_LINE}: {word!r} stands alone; write --key value, or --config FILE")
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                known = key in leaf_types() or key == "config"
                hint = "a value must follow" if known else _no_such_key(key)
                arguments.problems.append(f"{COMMAND_LINE}: {key}: {hint}")
                continue
            value = rest.pop(0)
        if key == "config":
            arguments.configs.append(value)
        else:
            arguments.assignments.extend(_of_section(key, value))
    return arguments


def _of_section(key: str, value: str) -> list[Assignment]:
    """One assignment; or those of a section's keys, where a W&B sweep of nested parameters gives them as one dictionary."""
    if key in sections() and value.startswith("{"):
        try:
            nested = yaml.safe_load(value)
        except yaml.YAMLError:
            nested = None
        if isinstance(nested, dict):
            return [Assignment(f"{key}.{name}", inner, COMMAND_LINE) for name, inner in nested.items()]
    return [Assignment(key, value, COMMAND_LINE)]


def _resolve(arguments: Arguments) -> TrainingConfig:
    problems = list(arguments.problems)
    assignments: list[Assignment] = []
    for name in arguments.configs:
        found, wrong = read_assignments(Path(name), sections())
        assignments += found
        problems += wrong
    set_keys: dict[str, Any] = {}
    places: dict[str, str] = {}
    for assignment in assignments + arguments.assignments:
        try:
            value = _checked(assignment)
        except ConfigError as error:
            problems.append(str(error))
            continue
        set_keys[assignment.key] = value
        places[assignment.key] = assignment.where
    try:
        following = keys_that_follow(set_keys)
    except RefusedError as error:
        problems += [_with_place(problem, places) for problem in str(error).splitlines()]
        following = {}
    nested: dict[str, Any] = {}
    for key, value in {**following, **set_keys}.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    config = _parser().instantiate(_parser().parse_object(nested))
    resolved = TrainingConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(TrainingConfig)})
    resolved = in_folder_of_its_own(resolved)
    broken = broken_rules(resolved, world_size=_ranks(problems))
    _raise_all(problems + [_with_place(problem, places) for problem in broken])
    return resolved


def _with_place(problem: str, places: Mapping[str, str]) -> str:
    """The sentence, after the place that set the first of the keys it names; as it is where all are defaults."""
    named = (word.strip(":,()") for word in problem.split())
    place = next((places[word] for word in named if word in places), None)
    return f"{place}: {problem}" if place else problem


def _checked(assignment: Assignment) -> Any:
    """The value in the type of its key. Raises ConfigError saying what is expected."""
    key, value, where = assignment.key, assignment.value, assignment.where
    types = leaf_types()
    if key in sections():
        raise ConfigError(f"{where}: {key}: is a section; set its keys, such as {key}.{_keys_of(key)[0]}")
    if key not in types:
        raise ConfigError(f"{where}: {key}: {_no_such_key(key)}")
    may_be_null = type(None) in get_args(types[key])
    if value is None or (value in ("null", "None") and may_be_null):  # as YAML, and as Python (W&B's sweeps) write it
        if may_be_null:
            return None
        raise ConfigError(f"{where}: {key}: must not be null; it is {_in_words(types[key])}")
    if str in (types[key], *get_args(types[key])) and isinstance(value, str):
        return value  # as it stands, be it "yes", "12" or "{question}"
    if int in (types[key], *get_args(types[key])):
        value = _whole(value)
    section, _, name = key.rpartition(".")
    try:
        parsed = _parser().parse_object({section: {name: value}} if section else {name: value})
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {key}: {value!r} is not {_in_words(types[key])}") from error
    return parsed[key]


def _whole(value: Any) -> Any:
    """1e3 and 2.0, which are whole numbers too, as such; anything else as it stands."""
    if isinstance(value, str | float) and re.fullmatch(r"[+-]?\d+(\.\d*)?([eE]\+?\d{1,2})?", str(value)):
        number = Decimal(str(value))
        return int(number) if number == number.to_integral_value() else value
    return value


def _no_such_key(key: str) -> str:
    known = list(leaf_types())
    last = key.rsplit(".", 1)[-1]
    near = (
        [name for name in known if name.rsplit(".", 1)[-1] == last]
        or [name for name in known if _initials(name) == last]
        or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        or difflib.get_close_matches(last, known, n=1, cutoff=0.5)
    )
    return f"no such key; did you mean {near[0]}?" if near else "no such key; --help lists them all"


def _initials(key: str) -> str:
    """The letters by which people call a key: "lr" for optim.learning_rate."""
    return "".join(word[0] for word in key.rsplit(".", 1)[-1].split("_"))


def _in_words(kind: Any) -> str:
    options = [option for option in get_args(kind) if option is not type(None)] if _is_union(kind) else [kind]
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text (put it in quotes)"}
    words = []
    for option in options:
        if get_origin(option) is Literal:
            words.append("one of " + ", ".join(map(str, get_args(option))))
        elif get_origin(option) is tuple:
            words.append(f"a list of {len(get_args(option))} numbers, such as [0.9, 0.95]")
        else:
            words.append(names.get(option, str(option)))
    return " or ".join([*words, "null"] if type(None) in get_args(kind) else words)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) is Union or type(kind).__name__ == "UnionType"


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


def _keys_of(section: str) -> list[str]:
    return [key.split(".")[1] for key in leaf_types() if key.startswith(f"{section}.")]


@cache
def _parser() -> ArgumentParser:
    return _new_parser()


def _new_parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--config FILE]... [--section.key VALUE]...",
        description="Train a decoder language model. Without arguments: a small one, on the text inside the package.",
        epilog="Several --config files may be given; later ones win, and the command line over all. "
        "--print_config prints the result as YAML. Starting a run again is the same command.",
        exit_on_error=False,
    )
    parser.add_class_arguments(TrainingConfig)
    return parser


def _help() -> str:
    """What --help prints: the options that `_take_apart` understands."""
    parser = _new_parser()
    parser.add_argument("--config", metavar="FILE", help="YAML file of keys; may be given several times, later ones win.")
    parser.add_argument("--print_config", action="store_true", help="Print the resulting config as YAML and exit.")
    for action in parser._actions:
        if action.dest in sections():
            action.help = SUPPRESS
    return parser.format_help()


def _ranks(problems: list[str]) -> int | None:
    """How many a launcher has started; None without one. Adds to `problems` where its variables make no sense."""
    try:
        ranks = place_of_this_process().world_size
    except ConfigError as error:
        problems.append(str(error))
        return None
    return ranks if ranks > 1 else None


def _raise_all(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems in the config:\n{lines}")
