"""Completion of keys and values for the shell: a script made by shtab, an optional extra, that starts no Python at a TAB."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from dist_trainer.config.cli import ALL, CONSOLE_SCRIPT, DRY_RUN, FLAGS, HELP_FLAGS, LIST, SHELLS, in_this_shell
from dist_trainer.config.keys import PATH_KEYS, leaf_types, options_of, section_classes, sentences_by_key
from dist_trainer.config.presets import PRESETS
from dist_trainer.config.registry_names import ROW_NAMES
from dist_trainer.errors import ConfigError


def completion_script(shell: str) -> str:
    """What `shell` must evaluate for `dist-train` to be completed. Raises ConfigError where shtab is not installed."""
    try:
        import shtab  # type: ignore[import-not-found]
    except ImportError as error:
        install = f"{in_this_shell()} -m pip install 'shtab>=1.9'"
        raise ConfigError(f"--print_completion: needs the package shtab, which is not here; {install}") from error
    parser = completion_parser()
    for action in parser._actions:
        if action.dest == "config" or action.dest in PATH_KEYS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell=shell) + "\n"


def completion_parser() -> argparse.ArgumentParser:
    """Every option of the training command, with the values it may have where these are few."""
    parser = argparse.ArgumentParser(prog=CONSOLE_SCRIPT, add_help=False)
    parser.add_argument(*HELP_FLAGS, nargs="?", choices=[*filter(None, section_classes()), ALL], help="how it is used")
    parser.add_argument("--config", help="YAML file of keys")
    parser.add_argument("--preset", choices=[*PRESETS, LIST], help="a size by name")
    parser.add_argument("--print_completion", choices=SHELLS, help="completion for a shell")
    of_flags = ("all up to the first step", "the resulting config", "the package's version")
    for flag, said in zip((DRY_RUN, *FLAGS), of_flags, strict=True):
        parser.add_argument(flag, action="store_true", help=said)
    for key, kind in leaf_types().items():
        said = _beginning(sentences_by_key()[key]).replace("%", "%%")
        parser.add_argument(f"--{key}", choices=values_of(key, kind), help=said)
    return parser


def values_of(key: str, kind: Any) -> list[str] | None:
    """The values that `key` may have, as they are typed; None where they are without end."""
    values = list(ROW_NAMES.get(key, ()))
    for option in options_of(kind):
        if get_origin(option) is Literal:
            values += map(str, get_args(option))
        elif option is bool:
            values += ["true", "false"]
    return values or None


def _beginning(text: str) -> str:
    """Of a sentence, without a bracket that is not closed."""
    begun = text.split(". ")[0].split("; ")[0].removesuffix(".")
    return begun if begun.count("(") == begun.count(")") else begun[: begun.rindex("(")].rstrip()
