"""The training command's arguments: which options there are, and how a command line is parsed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_trainer.config.aliases import unknown_key_message
from dist_trainer.config.keys import key_types, section_names
from dist_trainer.config.presets import PRESETS
from dist_trainer.config.values import unescape
from dist_trainer.config.yaml_files import Assignment, load_yaml
from dist_trainer.errors import ConfigError

CONSOLE_SCRIPT, MODULE = "dist-train", "python -m dist_trainer.train"
COMMAND_LINE = "command line"
"""How messages refer to it."""
DRY_RUN, PRINT_CONFIG, VERSION = "--dry_run", "--print_config", "--version"
FLAGS = (PRINT_CONFIG, VERSION)
HELP = ("--help", "-h")
ALL_SECTIONS = "all"
LIST_PRESETS = "list"
SHELLS = ("bash", "zsh", "fish")
VALUES_NEEDED = {
    "config": "a file",
    "preset": f"a name: {', '.join(PRESETS)}",
    "print_completion": f"one of {', '.join(SHELLS)}",
}
"""Options that are not keys, and what they need."""
TEMPLATE_KEYS = ("data.template", "data.completion_template")
"""Keys whose value may have escapes on the command line. In YAML, the quoting style decides what a backslash means."""


@dataclass
class Arguments:
    """A parsed command line."""

    configs: list[str] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    help_topic: str | None = None
    """"" (the first screen), a section, or `all`; None: help was not requested."""
    preset: str | None = None
    lists_presets: bool = False
    completion_shell: str | None = None

    def add_problem(self, problem: str) -> None:
        """Record a problem on the command line."""
        self.problems.append(f"{COMMAND_LINE}: {problem}")


def program() -> str:
    """How this process was started, for usage lines."""
    return CONSOLE_SCRIPT if Path(sys.argv[0]).name == CONSOLE_SCRIPT else MODULE


def command_path(program: str = "python", *, path: str | None = None) -> str:
    """How to call this process's Python, or a `program` installed with it, from the shell that started this process: by name if
    it is on the search path (None: $PATH), else by its full path, which needs no activated environment.
    """
    python = Path(sys.executable)
    installed = python if program == "python" else python.with_name(program)
    found = shutil.which(program, path=path)
    is_it = found is not None and Path(found).absolute().parent == installed.parent and os.path.samefile(found, installed)
    if is_it or not os.path.lexists(installed):
        return program
    return shlex.quote(str(installed.relative_to(Path.cwd()) if installed.is_relative_to(Path.cwd()) else installed))


def pop_dry_run(argv: Sequence[str] | None) -> tuple[list[str], bool]:
    """`argv` (None: this process's) without --dry_run, and whether that was there."""
    words = list(sys.argv[1:] if argv is None else argv)
    return [word for word in words if word != DRY_RUN], DRY_RUN in words


def split_off_keys(argv: Sequence[str], *, own: Collection[str], flags: Collection[str]) -> tuple[list[str], list[str]]:
    """Split another command's arguments into its own (options `own` with their values, and `flags` without) and training's
    (`--section.key VALUE`), whose values argparse would take for positional arguments of the command.
    """
    own_words, others, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        is_own = not word.startswith("--") or name in own
        part = own_words if is_own else others
        part.append(word)
        takes_value = name.startswith("--") and name not in flags and name != PRINT_CONFIG
        if takes_value and not equals and words and not words[0].startswith("--"):
            part.append(words.pop(0))
    return own_words, others


def parse_argv(argv: Sequence[str]) -> Arguments:
    """Parse the command line `argv`. Errors are in the result's `problems`."""
    arguments = Arguments()
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in HELP:
            _parse_help(words, arguments)
        elif word in FLAGS:
            arguments.flags.add(word)
        elif not word.startswith("--"):
            arguments.add_problem(f"unexpected argument {word!r}; write --{word if not equals else f'{name} {value}'}")
        elif equals and name in (*FLAGS, *HELP, DRY_RUN):
            arguments.add_problem(f"{name} takes no value")
        elif not equals and (not words or (words[0].startswith("--") and len(words[0]) > 2)):
            arguments.add_problem(_missing_value(name.removeprefix("--")))
        else:
            _set(name.removeprefix("--"), value if equals else words.pop(0), arguments)
    return arguments


def _parse_help(words: list[str], arguments: Arguments) -> None:
    """Parse --help and an optional section, which may also be written like the start of its keys, `--optim`."""
    topic = words[0].lstrip("-").rstrip(".") if words else ""
    if topic in (*section_names(), ALL_SECTIONS):
        words.pop(0)
        arguments.help_topic = topic
    elif words and not words[0].startswith("-"):
        choices = ", ".join((*section_names(), ALL_SECTIONS))
        arguments.add_problem(f"--help: unknown section {words.pop(0)!r}; choose from {choices}")
    else:
        arguments.help_topic = ""


def _set(key: str, value: str, arguments: Arguments) -> None:
    if key == "config":
        arguments.configs.append(value)
    elif key == "preset" and value == LIST_PRESETS:
        arguments.lists_presets = True
    elif key == "preset" and value not in PRESETS:
        choices = ", ".join(PRESETS)
        arguments.add_problem(f"unknown preset {value!r}; choose from {choices} (`--preset {LIST_PRESETS}` shows their sizes)")
    elif key == "preset" and arguments.preset is not None:
        arguments.add_problem(f"--preset given twice ({arguments.preset}, {value})")
    elif key == "preset":
        arguments.preset = value
    elif key == "print_completion":
        if value not in SHELLS:
            arguments.add_problem(f"--print_completion: {value!r} is not one of {', '.join(SHELLS)}")
        arguments.completion_shell = value
    else:
        arguments.assignments += _assignments(key, value)


def _assignments(key: str, value: str) -> list[Assignment]:
    """One assignment; or one per key of a section, if a W&B sweep with nested parameters gives them as one dictionary."""
    if key in section_names() and value.startswith("{"):
        try:
            nested = load_yaml(value, COMMAND_LINE)
        except ConfigError:
            nested = None
        if isinstance(nested, dict):
            return [Assignment(f"{key}.{name}", inner, COMMAND_LINE) for name, inner in nested.items()]
    return [Assignment(key, unescape(value) if key in TEMPLATE_KEYS else value, COMMAND_LINE)]


def _missing_value(key: str) -> str:
    if key in VALUES_NEEDED:
        return f"--{key} needs {VALUES_NEEDED[key]}"
    return f"--{key} needs a value" if key in key_types() else f"{key}: {unknown_key_message(key)}"
