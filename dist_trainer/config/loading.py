"""From files and arguments to one TrainingConfig, with all problems in one message; and back to YAML.

jsonargparse checks types, here and nowhere else. Where each value stands is tracked beside it, since a message that names no
line sends the reader searching.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from dist_trainer.config.aliases import RENAMED_KEYS
from dist_trainer.config.cli import COMMAND_LINE, VERSION, Arguments, parse_argv, program
from dist_trainer.config.completion import completion_script
from dist_trainer.config.help import help_text
from dist_trainer.config.keys import (
    PATH_KEYS,
    flatten,
    in_words,
    keys_of,
    leaf_types,
    may_be_null,
    near_value,
    no_such_key,
    section_classes,
    sections,
)
from dist_trainer.config.paths import user_path
from dist_trainer.config.presets import preset_keys, presets_in_words
from dist_trainer.config.rules import broken_rules
from dist_trainer.config.schema import SHAPE_FIELDS, TrainingConfig, keys_in_use
from dist_trainer.config.sweep_run import in_folder_of_its_own
from dist_trainer.config.yaml_files import Assignment, read_assignments
from dist_trainer.errors import ConfigError, RefusedError
from dist_trainer.version import VERSION_LINE


def config_from_argv(
    argv: Sequence[str] | None,
    *,
    trains: bool,
    count_ranks: Callable[[], int],
    derive_keys: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> TrainingConfig:
    """What run.configure.load_config returns. This package knows neither launchers nor models, so it is given both:
    `count_ranks` returns the number of ranks; `derive_keys` returns values for dotted keys that the ones set imply. Either may
    raise RefusedError, which is reported together with all other problems.
    """
    arguments = parse_argv(sys.argv[1:] if argv is None else argv)
    if arguments.help_on is not None:
        _print_and_leave(help_text(arguments.help_on, program(), coloured=sys.stdout.isatty()))
    if VERSION in arguments.flags:
        _print_and_leave(f"{VERSION_LINE}\n")
    if arguments.lists_presets:
        _print_and_leave(presets_in_words())
    if arguments.shell is not None:
        _raise_all(arguments.problems)
        _print_and_leave(completion_script(arguments.shell))
    config = _resolve(arguments, trains, count_ranks, derive_keys)
    if "--print_config" in arguments.flags:
        _print_and_leave(dump_config(config))
    return config


def _print_and_leave(text: str) -> NoReturn:
    print(text, end="")
    raise SystemExit(0)


def keys_given(argv: Sequence[str]) -> set[str]:
    """The dotted keys that the command line `argv` sets, itself or in its --config files, as far as these can be read."""
    arguments = parse_argv(argv)
    in_files = [assignment for name in arguments.configs for assignment in read_assignments(user_path(name), sections())[0]]
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
    plain["model"] = {name: value for name, value in plain["model"].items() if name in keys_in_use(config.model)}
    plain["optim"]["betas"] = list(config.optim.betas)
    return plain


def config_differences(before: TrainingConfig | Mapping[str, Any], now: TrainingConfig) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of each dotted key that differs; a key that is missing before has its default."""
    earlier = flatten(before if isinstance(before, Mapping) else as_dict(before))
    earlier = {RENAMED_KEYS.get(key, key): value for key, value in earlier.items()}
    defaults, current = flatten(as_dict(TrainingConfig())), flatten(as_dict(now))
    both = [(key, earlier.get(key, defaults.get(key)), value) for key, value in current.items()]
    return [difference for difference in both if difference[1] != difference[2]]


# ------------------------------------------------------------------------------------------------ the parts


def _resolve(
    arguments: Arguments,
    trains: bool,
    count_ranks: Callable[[], int],
    derive_keys: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> TrainingConfig:
    problems = list(arguments.problems)
    asked = _asked_for(arguments, problems)
    ranks = 1
    try:
        ranks = count_ranks()
    except RefusedError as error:
        problems.append(str(error))
    following = _keys_from_elsewhere(arguments.preset, asked, problems, ranks, derive_keys)
    resolved = in_folder_of_its_own(_config_of({**following, **asked.values}))
    broken = broken_rules(resolved, world_size=ranks if trains and ranks > 1 else None)
    _raise_all(problems + [_with_place(problem, asked.places) for problem in broken])
    return resolved


def _config_of(values: Mapping[str, Any]) -> TrainingConfig:
    """The config in which dotted keys have these values, and all others their defaults."""
    of_section: dict[str, dict[str, Any]] = {name: {} for name in section_classes()}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        of_section[section][name] = value
    outside = of_section.pop("")
    return TrainingConfig(**outside, **{name: section_classes()[name](**inner) for name, inner in of_section.items()})


@dataclass
class _Asked:
    """What files and arguments set."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    in_whole_files: set[str] = field(default_factory=set)
    """Keys from a file that states every key there is, such as configs/default.yaml."""

    def assign(self, assignment: Assignment, value: Any, *, in_whole_file: bool) -> None:
        """The last one counts."""
        self.values[assignment.key], self.places[assignment.key] = value, assignment.where
        (self.in_whole_files.add if in_whole_file else self.in_whole_files.discard)(assignment.key)

    def drop_defaults(self, group: Iterable[str]) -> None:
        """A file that states every key asks for none of `group` where it leaves all of these at their defaults."""
        defaults = flatten(dataclasses.asdict(TrainingConfig()))
        stated = [key for key in group if key in self.in_whole_files]
        if all(self.values[key] == defaults[key] for key in stated):
            for key in stated:
                del self.values[key], self.places[key]


def _asked_for(arguments: Arguments, problems: list[str]) -> _Asked:
    asked = _Asked()
    for name in (*arguments.configs, None):
        assignments, wrong = read_assignments(user_path(name), sections()) if name is not None else (arguments.assignments, [])
        problems += wrong
        is_whole = leaf_types().keys() <= {assignment.key for assignment in assignments}
        for assignment in assignments:
            if name is not None and _is_written_by_a_run(user_path(name)):
                assignment = dataclasses.replace(assignment, key=RENAMED_KEYS.get(assignment.key, assignment.key))
            try:
                asked.assign(assignment, _checked(assignment), in_whole_file=is_whole)
            except ConfigError as error:
                problems.append(str(error))
    return asked


def _is_written_by_a_run(config_file: Path) -> bool:
    return config_file.name == "config.yaml" and (config_file.parent / "checkpoints").is_dir()


def _keys_from_elsewhere(
    preset: str | None,
    asked: _Asked,
    problems: list[str],
    ranks: int,
    derive_keys: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Values for keys that nobody asked for: the preset's, or those of the model to start from."""
    initial = asked.values.get("model.init_from")
    if preset is not None and initial is not None:
        problems.append(
            f"{COMMAND_LINE}: --preset: {preset} is for training from nothing, but model.init_from ({initial}) brings a shape "
            "of its own; leave one of them out"
        )
        return {}
    if preset is not None:
        asked.drop_defaults(preset_keys(preset, {}))
        keys = preset_keys(preset, asked.values, ranks=ranks)
        asked.places = {**dict.fromkeys(keys, f"preset {preset}"), **asked.places}
        return keys
    if initial is not None and "model.init_from" not in asked.in_whole_files:
        for group in ([f"model.{name}" for name in SHAPE_FIELDS], ["model.dropout"], ["data.tokenizer"]):
            asked.drop_defaults(group)
    try:
        return derive_keys(asked.values)
    except RefusedError as error:
        problems += [_with_place(problem, asked.places) for problem in str(error).splitlines()]
        return {}


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
        raise ConfigError(f"{where}: {key}: is a section; set its keys, such as {keys_of(key)[0]}")
    if key not in types:
        raise ConfigError(f"{where}: {key}: {no_such_key(key)}")
    nullable = may_be_null(types[key])
    if value is None or (value in ("null", "None") and nullable):  # as YAML, and as Python (W&B's sweeps) write it
        if nullable:
            return None
        raise ConfigError(f"{where}: {key}: must not be null; it is {in_words(types[key])}{near_value(None, types[key])}")
    if str in (types[key], *get_args(types[key])) and isinstance(value, str):
        if key in PATH_KEYS:
            try:
                user_path(value)
            except ConfigError as error:
                raise ConfigError(f"{where}: {key}: {error}") from error
        return value  # as it stands, be it "yes", "12" or "{question}"
    if int in (types[key], *get_args(types[key])):
        value = _whole(value)
    try:
        value = _parser(types[key]).parse_object({"value": value})["value"]
    except (ArgumentError, TypeError, ValueError, OverflowError, RecursionError) as error:
        hint = near_value(value, types[key])
        raise ConfigError(f"{where}: {key}: {value!r:.200} is not {in_words(types[key])}{hint}") from error
    if isinstance(value, int) and abs(value) >= 1 << 64:
        raise ConfigError(f"{where}: {key}: {value!r:.80} is too large; it must fit into 64 bits")
    return value


def _whole(value: Any) -> Any:
    """1e3 and 2.0, which are whole numbers too, as such; anything else as it stands."""
    if isinstance(value, str | float) and re.fullmatch(r"[+-]?\d+(\.\d*)?([eE]\+?\d{1,2})?", str(value)):
        number = Decimal(str(value))
        return int(number) if number == number.to_integral_value() else value
    return value


@cache
def _parser(kind: Any) -> ArgumentParser:
    """Of one value of that type: a parser of all keys takes thirty milliseconds for each."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


def _raise_all(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems in the config:\n{lines}")
