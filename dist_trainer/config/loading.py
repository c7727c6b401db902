"""Builds a TrainingConfig from files and arguments, reporting all problems in one message; and writes it back to YAML."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from dist_trainer.config.aliases import RENAMED_KEYS, suggest_value, unknown_key_message
from dist_trainer.config.command_line import COMMAND_LINE, PRINT_CONFIG, VERSION, Arguments, parse_argv, program
from dist_trainer.config.help import completion_script, help_text
from dist_trainer.config.keys import PATH_KEYS, flatten, key_types, keys_of, section_classes, section_names
from dist_trainer.config.paths import RUN_CONFIG, is_run_folder, sweep_run_name, user_path
from dist_trainer.config.presets import format_presets, preset_keys
from dist_trainer.config.rules import raise_problems, rule_violations
from dist_trainer.config.schema import SHAPE_FIELDS, TRANSFORMERS, TrainingConfig
from dist_trainer.config.values import format_type, is_nullable, parse_value
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
    """What run.configure.load_config returns. This package knows neither launchers nor models, so the caller passes two
    functions: `count_ranks` returns the number of ranks; `derive_keys` returns values for dotted keys implied by those set.
    Either may raise RefusedError, which is reported together with all other problems.
    """
    arguments = parse_argv(sys.argv[1:] if argv is None else argv)
    if arguments.help_topic is not None:
        _print_and_exit(help_text(arguments.help_topic, program(), coloured=sys.stdout.isatty()))
    if VERSION in arguments.flags:
        _print_and_exit(f"{VERSION_LINE}\n")
    if arguments.lists_presets:
        _print_and_exit(format_presets())
    if arguments.completion_shell is not None:
        raise_problems(arguments.problems)
        _print_and_exit(completion_script(arguments.completion_shell))

    settings = _read_settings(arguments)
    ranks = 1
    try:
        ranks = count_ranks()
    except RefusedError as error:
        settings.problems.append(str(error))
    if arguments.preset is not None:
        implied = _preset_keys(arguments.preset, settings, ranks)
    else:
        implied = _derived_keys(settings, derive_keys)
    config = _build_config({**implied, **settings.values})
    config = dataclasses.replace(config, run_name=sweep_run_name(config.run_name))
    violations = rule_violations(config, world_size=ranks if trains and ranks > 1 else None)
    raise_problems(settings.problems + [settings.locate(violation) for violation in violations])
    if PRINT_CONFIG in arguments.flags:
        _print_and_exit(dump_config(config))
    return config


def assigned_keys(argv: Sequence[str]) -> set[str]:
    """The dotted keys that the command line `argv` sets, directly or in --config files, as far as these can be read."""
    arguments = parse_argv(argv)
    in_files = [each for name in arguments.configs for each in read_assignments(user_path(name), section_names())[0]]
    return {assignment.key for assignment in (*in_files, *arguments.assignments)}


def dump_config(config: TrainingConfig) -> str:
    """YAML that loads to the same config."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=120)


def as_dict(config: TrainingConfig) -> dict[str, Any]:
    """Nested dictionaries of plain values, without the model keys that this kind of model ignores."""
    plain = dataclasses.asdict(config)
    if config.model.name == TRANSFORMERS:
        plain["model"] = {"name": TRANSFORMERS, "init_from": config.model.init_from}
    plain["optim"]["betas"], plain["train"]["callbacks"] = list(config.optim.betas), list(config.train.callbacks)
    return plain


def config_differences(before: TrainingConfig | Mapping[str, Any], now: TrainingConfig) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of each dotted key that differs; a key that is missing before has its default."""
    earlier = flatten(before if isinstance(before, Mapping) else as_dict(before))
    earlier = {RENAMED_KEYS.get(key, key): value for key, value in earlier.items()}
    defaults, current = flatten(as_dict(TrainingConfig())), flatten(as_dict(now))
    both = [(key, earlier.get(key, defaults.get(key)), value) for key, value in current.items()]
    return [difference for difference in both if difference[1] != difference[2]]


@dataclass
class _Settings:
    """What files and arguments set."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    in_complete_files: set[str] = field(default_factory=set)
    """Keys set by a file that contains every key, such as configs/default.yaml."""
    problems: list[str] = field(default_factory=list)

    def assign(self, assignment: Assignment, *, in_complete_file: bool) -> None:
        """Check and set one key; a later assignment overrides an earlier one."""
        key = assignment.key
        try:
            self.values[key] = _check_assignment(assignment)
        except ConfigError as error:
            self.problems.append(str(error))
            return
        self.places[key] = assignment.where
        (self.in_complete_files.add if in_complete_file else self.in_complete_files.discard)(key)

    def drop_defaults(self, group: Iterable[str]) -> None:
        """Unset the keys in `group` that a complete file sets, if it leaves all of them at their defaults: people copy such a
        file to change other keys, and do not mean to set these.
        """
        defaults = flatten(dataclasses.asdict(TrainingConfig()))
        stated = [key for key in group if key in self.in_complete_files]
        if all(self.values[key] == defaults[key] for key in stated):
            for key in stated:
                del self.values[key], self.places[key]

    def locate(self, problem: str) -> str:
        """`problem`, prefixed with the place that set the first key it names; unchanged if all of them are defaults."""
        words = (word.strip(":,()") for word in problem.split())
        place = next((self.places[word] for word in words if word in self.places), None)
        return f"{place}: {problem}" if place else problem


def _read_settings(arguments: Arguments) -> _Settings:
    settings = _Settings(problems=list(arguments.problems))
    for name in arguments.configs:
        path = user_path(name)
        assignments, problems = read_assignments(path, section_names())
        settings.problems += problems
        if path.name == RUN_CONFIG and is_run_folder(path.parent):  # written by a run, perhaps an older one
            assignments = [dataclasses.replace(each, key=RENAMED_KEYS.get(each.key, each.key)) for each in assignments]
        is_complete = key_types().keys() <= {assignment.key for assignment in assignments}
        for assignment in assignments:
            settings.assign(assignment, in_complete_file=is_complete)
    for assignment in arguments.assignments:
        settings.assign(assignment, in_complete_file=False)
    return settings


def _check_assignment(assignment: Assignment) -> Any:
    """The value, converted to its key's type. Raises ConfigError that says what is expected."""
    key, value, where = assignment.key, assignment.value, assignment.where
    if key in section_names():
        raise ConfigError(f"{where}: {key}: is a section; set its keys, such as {keys_of(key)[0]}")
    kind = key_types().get(key)
    if kind is None:
        raise ConfigError(f"{where}: {key}: {unknown_key_message(key)}")
    if value is None or (value in ("null", "None") and is_nullable(kind)):  # as YAML and as Python (W&B's sweeps) write it
        if is_nullable(kind):
            return None
        raise ConfigError(f"{where}: {key}: must not be null; it is {format_type(kind)}{suggest_value(None, kind)}")
    try:
        value = parse_value(value, kind)
        if key in PATH_KEYS:
            user_path(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {key}: {error}{suggest_value(value, kind)}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {key}: {error}") from error
    if isinstance(value, int) and abs(value) >= 1 << 64:
        raise ConfigError(f"{where}: {key}: {value!r:.80} is too large; it must fit into 64 bits")
    return value


def _preset_keys(preset: str, settings: _Settings, ranks: int) -> dict[str, Any]:
    if (init_from := settings.values.get("model.init_from")) is not None:
        settings.problems.append(
            f"{COMMAND_LINE}: --preset {preset} is for training from scratch, but model.init_from ({init_from}) determines the "
            "model's shape; leave one of them out"
        )
        return {}
    settings.drop_defaults(preset_keys(preset, {}))
    keys = preset_keys(preset, settings.values, ranks=ranks)
    settings.places = {**dict.fromkeys(keys, f"preset {preset}"), **settings.places}
    return keys


def _derived_keys(settings: _Settings, derive_keys: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    if settings.values.get("model.init_from") is not None and "model.init_from" not in settings.in_complete_files:
        for group in ([f"model.{name}" for name in SHAPE_FIELDS], ["model.dropout"], ["data.tokenizer"]):
            settings.drop_defaults(group)
    try:
        return derive_keys(settings.values)
    except RefusedError as error:
        settings.problems += [settings.locate(problem) for problem in str(error).splitlines()]
        return {}


def _build_config(values: Mapping[str, Any]) -> TrainingConfig:
    """The config with these values for dotted keys, and defaults for all others."""
    by_section: dict[str, dict[str, Any]] = {name: {} for name in section_classes()}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        by_section[section][name] = value
    top = by_section.pop("")
    return TrainingConfig(**top, **{name: section_classes()[name](**inner) for name, inner in by_section.items()})


def _print_and_exit(text: str) -> NoReturn:
    print(text, end="")
    raise SystemExit(0)
