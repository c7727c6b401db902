"""The words of the training command, taken apart: files, keys, flags."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_trainer.config.keys import leaf_types, no_such_key, section_classes, sections
from dist_trainer.config.presets import PRESETS
from dist_trainer.config.yaml_files import Assignment, load_yaml
from dist_trainer.errors import ConfigError

CONSOLE_SCRIPT, MODULE = "dist-train", "python -m dist_trainer.train"
COMMAND_LINE = "command line"
HELP_FLAGS = ("--help", "-h")
DRY_RUN = "--dry_run"
VERSION = "--version"
FLAGS = ("--print_config", VERSION)
ALL = "all"
LIST = "list"
SHELLS = ("bash", "zsh", "fish")
TEMPLATE_KEYS = ("data.template", "data.completion_template")
"""Keys whose value may have escapes on the command line. In YAML its own quotes say what a backslash means."""


@dataclass
class Arguments:
    """A command line, taken apart."""

    configs: list[str] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    help_on: str | None = None
    """What help is asked for: "" (the first screen), a section, or `all`; None: none is."""
    preset: str | None = None
    lists_presets: bool = False
    shell: str | None = None
    """The shell whose completion script is asked for."""


def program() -> str:
    """How this process was called, for usage lines."""
    return CONSOLE_SCRIPT if Path(sys.argv[0]).name == CONSOLE_SCRIPT else MODULE


def in_this_shell(program: str = "python", *, path: str | None = None) -> str:
    """How to call this process's Python, or a `program` installed with it, in the shell that started this process: by its name
    if the search path (None: $PATH) leads there, else by its file, which needs no activated environment.
    """
    python = Path(sys.executable)
    here = python if program == "python" else python.with_name(program)
    found = shutil.which(program, path=path)
    is_it = found is not None and Path(found).absolute().parent == here.parent and os.path.samefile(found, here)
    if is_it or not os.path.lexists(here):
        return program
    return shlex.quote(str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here))


def pop_dry_run(argv: Sequence[str] | None) -> tuple[list[str], bool]:
    """The words (None: this process's) that say what to train, and whether a dry run is asked for."""
    words = list(sys.argv[1:] if argv is None else argv)
    return [word for word in words if word != DRY_RUN], DRY_RUN in words


def parse_argv(argv: Sequence[str]) -> Arguments:
    """The command line `argv`; what cannot be understood stands in its `problems`."""
    arguments = Arguments()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in HELP_FLAGS:
            _take_help(rest, arguments)
        elif word in FLAGS:
            arguments.flags.add(word)
        elif not word.startswith("--"):
            arguments.problems.append(f"{COMMAND_LINE}: {word!r} stands alone; write --key value, or --config FILE")
        else:
            _take_key(word[2:], rest, arguments)
    return arguments


def _take_help(rest: list[str], arguments: Arguments) -> None:
    """--help, and the section that may follow; this may be written as the beginning of its keys, `--optim`."""
    topic = rest[0].lstrip("-").rstrip(".") if rest else ""
    if topic in sections() or topic == ALL:
        rest.pop(0)
        arguments.help_on = topic
    elif rest and not rest[0].startswith("-"):
        named = ", ".join(name for name in section_classes() if name)
        arguments.problems.append(f"{COMMAND_LINE}: --help: there is no section {rest.pop(0)!r}; there are {named}, and {ALL}")
    else:
        arguments.help_on = ""


def _take_key(word: str, rest: list[str], arguments: Arguments) -> None:
    """`word` without its dashes, and the value behind it."""
    key, equals, value = word.partition("=")
    if equals and f"--{key}" in (*FLAGS, *HELP_FLAGS, DRY_RUN):
        arguments.problems.append(f"{COMMAND_LINE}: --{key} takes no value; write it alone")
        return
    if not equals:
        if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
            arguments.problems.append(f"{COMMAND_LINE}: {key}: {_what_must_follow(key)}")
            return
        value = rest.pop(0)
    if key == "config":
        arguments.configs.append(value)
    elif key == "preset":
        _take_preset(value, arguments)
    elif key == "print_completion":
        if value not in SHELLS:
            arguments.problems.append(f"{COMMAND_LINE}: --print_completion: {value!r} is not one of {', '.join(SHELLS)}")
        arguments.shell = value
    else:
        arguments.assignments.extend(_of_section(key, value))


def _of_section(key: str, value: str) -> list[Assignment]:
    """One assignment; or those of a section's keys, where a W&B sweep of nested parameters gives them as one dictionary."""
    if key in sections() and value.startswith("{"):
        try:
            nested = load_yaml(value, COMMAND_LINE)
        except ConfigError:
            nested = None
        if isinstance(nested, dict):
            return [Assignment(f"{key}.{name}", inner, COMMAND_LINE) for name, inner in nested.items()]
    return [Assignment(key, unescaped(value) if key in TEMPLATE_KEYS else value, COMMAND_LINE)]


def unescaped(text: str) -> str:
    r"""`text` with `\n`, `\t` and `\\` replaced by a line end, a tab and a backslash."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], "\\"), text)


def _what_must_follow(key: str) -> str:
    if key == "preset":
        return f"a name must follow: {', '.join(PRESETS)}"
    if key == "print_completion":
        return f"a shell must follow: {', '.join(SHELLS)}"
    return "a value must follow" if key in leaf_types() or key == "config" else no_such_key(key)


def _take_preset(name: str, arguments: Arguments) -> None:
    if name == LIST:
        arguments.lists_presets = True
    elif name not in PRESETS:
        arguments.problems.append(
            f"{COMMAND_LINE}: --preset: there is no {name!r}; there are {', '.join(PRESETS)}; "
            f"`--preset {LIST}` shows their sizes"
        )
    elif arguments.preset is not None:
        arguments.problems.append(f"{COMMAND_LINE}: --preset stands twice ({arguments.preset}, {name}); give one of them")
    else:
        arguments.preset = name
