"""What --help prints (a first screen, the keys of one section, or all of them), and the shell-completion script."""

from __future__ import annotations

import argparse
import os
import shutil
import textwrap
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from dist_trainer.config.command_line import (
    ALL_SECTIONS,
    CONSOLE_SCRIPT,
    DRY_RUN,
    HELP,
    LIST_PRESETS,
    PRINT_CONFIG,
    SHELLS,
    VERSION,
    command_path,
)
from dist_trainer.config.keys import PATH_KEYS, descriptions, format_default, key_types, keys_of, section_classes, section_names
from dist_trainer.config.presets import PRESETS
from dist_trainer.config.registry import ENTRY_NAMES
from dist_trainer.config.values import choices_of, is_nullable, union_members
from dist_trainer.errors import ConfigError

MAX_WIDTH = 96
_COLUMN = 34
_MOST_USED = (
    "run_name",
    "data.dataset",
    "data.tokenizer",
    "data.sequence_length",
    "model.init_from",
    "batch.global_batch_size",
    "batch.micro_batch_size",
    "optim.learning_rate",
    "train.max_steps",
    "train.epochs",
)
_EXAMPLES = {
    "train a small model on the built-in corpus": "",
    "train on your own texts, in a run named mine": "--run_name mine --data.dataset my_texts/",
    "measure the time and memory that a preset needs, without training": f"--run_name ten --preset 10m {DRY_RUN}",
    "fine-tune a model from the Hugging Face Hub": "--run_name tuned --model.init_from HuggingFaceTB/SmolLM2-135M "
    "\\\n      --data.dataset my_texts/ --optim.learning_rate 2e-5",
    "all keys with their values, as a starting config": f"{PRINT_CONFIG} > mine.yaml",
}
_SIZES = ", ".join(f"{name} ({preset.parameters / 1e6:.3g}M)" for name, preset in PRESETS.items())
_OPTIONS = {
    "--config FILE": "YAML file of keys; may be repeated: later files override earlier ones, the command line overrides all",
    "--preset NAME": "a model size with matching learning rate and batch size (parameter counts exclude the embedding): "
    f"{_SIZES}; files and keys override it; `--preset {LIST_PRESETS}` shows what each one sets",
    DRY_RUN: "go through start-up, try the largest batch, report time and memory; writes no run folder",
    PRINT_CONFIG: "print the resulting config as YAML",
    "--print_completion SHELL": f"print the shell-completion script ({', '.join(SHELLS)})",
    VERSION: "print the version",
    f"{', '.join(HELP)} [SECTION]": "print this help, or the keys of a section",
}


def help_text(topic: str, program: str, *, coloured: bool = False) -> str:
    """The first screen for an empty topic, the keys of the section `topic`, or `all` keys; `program` is how it is called."""
    bold = _bold if coloured and not os.environ.get("NO_COLOR") else str
    if topic:
        sections = section_classes() if topic == ALL_SECTIONS else {topic: section_classes()[topic]}
        return "\n".join(_format_section(name, kind, bold) for name, kind in sections.items())
    examples = "".join(f"  {what}\n    {bold(f'{program} {words}'.rstrip())}\n" for what, words in _EXAMPLES.items())
    keys = "".join(_format_entry(f"--{key} {_placeholder(key_types()[key])}", _summary(key)) for key in _MOST_USED)
    options = "".join(_format_entry(words, text) for words, text in _OPTIONS.items())
    more = [
        f"keys of a section   {program} --help optim",
        *textwrap.wrap(f"sections            {', '.join(section_names())}", _width() - 2, subsequent_indent=" " * 20),
        f"all keys            {program} --help {ALL_SECTIONS}, docs/configuration.md",
    ]
    about = (
        "Trains a decoder-only language model. Without arguments: a small one, on the built-in corpus.",
        "To resume a run that was stopped or killed, give the same command again.",
    )
    return (
        "".join(f"{textwrap.fill(sentence, _width())}\n" for sentence in about) + "\n"
        f"{bold('usage')}\n  {program} [--config FILE]... [--preset NAME] [--section.key VALUE]...\n"
        "  torchrun --nproc_per_node=8 -m dist_trainer.train [same arguments]      on 8 GPUs\n\n"
        f"{bold('examples')}\n{examples}\n"
        f"{bold('most-used keys')} (default)\n{keys}\n"
        f"{bold('options')}\n{options}\n"
        f"{bold('more')}\n" + "".join(f"  {line}\n" for line in more)
    )


def completion_script(shell: str) -> str:
    """The script that `shell` evaluates to complete `dist-train`'s arguments; pressing TAB then does not start Python.

    Raises ConfigError if shtab, an optional dependency, is not installed.
    """
    try:
        import shtab  # type: ignore[import-not-found]
    except ImportError as error:
        install = f"{command_path()} -m pip install 'shtab>=1.9'"
        raise ConfigError(f"--print_completion: needs the package shtab, which is not installed; {install}") from error
    parser = completion_parser()
    for action in parser._actions:
        if action.dest == "config" or action.dest in PATH_KEYS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell=shell) + "\n"


def completion_parser() -> argparse.ArgumentParser:
    """A parser with every option of the training command, and its values if there are only a few."""
    parser = argparse.ArgumentParser(prog=CONSOLE_SCRIPT, add_help=False)
    choices = {"--preset": [*PRESETS, LIST_PRESETS], "--print_completion": SHELLS}
    for words, text in _OPTIONS.items():
        option, _, placeholder = words.rpartition(" ")
        summary = _first_clause(text).replace("%", "%%")
        if words.startswith(HELP[0]):
            parser.add_argument(*HELP, nargs="?", choices=[*section_names(), ALL_SECTIONS], help=summary)
        elif option:
            parser.add_argument(option, metavar=placeholder, choices=choices.get(option), help=summary)
        else:
            parser.add_argument(words, action="store_true", help=summary)
    for key, kind in key_types().items():
        values = [*ENTRY_NAMES.get(key, ()), *choices_of(kind)]
        parser.add_argument(f"--{key}", choices=values or None, help=_first_clause(descriptions()[key]).replace("%", "%%"))
    return parser


def _format_section(name: str, kind: type, bold: Callable[[str], str]) -> str:
    about = " ".join((kind.__doc__ or "").split())
    lines = [textwrap.fill(f"{bold(name)}: {about}" if name else about, _width()) + "\n"]
    for key in keys_of(name):
        lines.append(f"  {bold('--' + key)} {_placeholder(key_types()[key])} ({format_default(key)})\n")
        lines.append(textwrap.indent(textwrap.fill(descriptions()[key], _width() - 6), " " * 6) + "\n")
    return "".join(lines)


def _format_entry(words: str, text: str) -> str:
    """An option and what it does, in two columns."""
    first = f"  {words}".ljust(_COLUMN)
    start = first if len(first) == _COLUMN else f"{first}\n{' ' * _COLUMN}"
    filled = textwrap.fill(text, _width() - _COLUMN, break_long_words=False, break_on_hyphens=False)
    return start + filled.replace("\n", "\n" + " " * _COLUMN) + "\n"


def _width() -> int:
    """The terminal's width, at most MAX_WIDTH. Commands are not wrapped, so that they can be copied."""
    return max(_COLUMN + 20, min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns))


def _summary(key: str) -> str:
    """The first clause of a key's description, with what null means, and its default."""
    first, *others = descriptions()[key].split(". ")[0].removesuffix(".").split("; ")
    return "; ".join([first, *(part for part in others if part.startswith("null:"))]) + f" ({format_default(key)})"


def _first_clause(text: str) -> str:
    """The first clause of `text`, without an unclosed bracket."""
    clause = text.split(". ")[0].split("; ")[0].removesuffix(".")
    return clause if clause.count("(") == clause.count(")") else clause[: clause.rindex("(")].rstrip()


def _placeholder(kind: Any) -> str:
    """What to type: `NUMBER`, `true|false`, `auto|fp32|bf16`."""
    words: list[str] = []
    for option in union_members(kind):
        if get_origin(option) is Literal:
            words += map(str, get_args(option))
        elif option == tuple[str, ...]:
            words.append("[TEXT,...]")
        elif get_origin(option) is tuple:
            words.append("[NUMBER,NUMBER]")
        else:
            words.append({bool: "true|false", int: "N", float: "NUMBER"}.get(option, "TEXT"))
    return "|".join([*words, "null"] if is_nullable(kind) else words)


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m"
