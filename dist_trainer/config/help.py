"""What --help prints: a first screen, the keys of one section, or all of them."""

from __future__ import annotations

import os
import shutil
import textwrap
from typing import Any, Literal, get_args, get_origin

import yaml

from dist_trainer.config.cli import ALL, DRY_RUN, SHELLS, VERSION
from dist_trainer.config.keys import keys_of, leaf_types, may_be_null, options_of, section_classes, sentences_by_key
from dist_trainer.config.presets import PRESETS
from dist_trainer.config.schema import TrainingConfig

WIDTH = 96
"""Columns, at most."""
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
    "a small model on the text inside the package": "",
    "your own texts, in a run of its own": "--run_name mine --data.dataset my_texts/",
    "a size by name: what it takes, and how long, without training": f"--run_name ten --preset 10m {DRY_RUN}",
    "fine-tune a model from the Hugging Face Hub": "--run_name tuned --model.init_from HuggingFaceTB/SmolLM2-135M "
    "\\\n      --data.dataset my_texts/ --optim.learning_rate 2e-5",
    "every key and its value, to be kept and changed": "--print_config > mine.yaml",
}


def help_text(topic: str, program: str, *, coloured: bool = False) -> str:
    """The first screen for an empty topic, the keys of the section `topic`, or `all`; `program` is how it is called."""
    bold = _bold if coloured and not os.environ.get("NO_COLOR") else str
    if topic:
        chosen = {name: kind for name, kind in section_classes().items() if topic in (name, ALL)}
        return "\n".join(_section(name, kind, bold) for name, kind in chosen.items())
    examples = "".join(f"  {what}\n    {bold(f'{program} {words}'.rstrip())}\n" for what, words in _EXAMPLES.items())
    keys = "".join(_entry(f"--{key} {_placeholder(leaf_types()[key])}", _short(key)) for key in _MOST_USED)
    options = "".join(_entry(words, text) for words, text in _options().items())
    named = ", ".join(name for name in section_classes() if name)
    more = [
        f"all keys of a section   {program} --help optim",
        *textwrap.wrap(f"sections                {named}", _width() - 2, subsequent_indent=" " * 24),
        f"all keys                {program} --help {ALL}, docs/configuration.md",
    ]
    about = (
        "Trains a decoder language model. Without arguments: a small one, on the text inside the package.",
        "A run that was stopped, or killed, goes on where the same command is given again.",
    )
    return (
        "".join(f"{textwrap.fill(sentence, _width())}\n" for sentence in about) + "\n"
        f"{bold('usage')}\n  {program} [--config FILE]... [--preset NAME] [--section.key VALUE]...\n"
        "  torchrun --nproc_per_node=8 -m dist_trainer.train [the same]      on 8 GPUs\n\n"
        f"{bold('examples')}\n{examples}\n"
        f"{bold('keys most used')} (default)\n{keys}\n"
        f"{bold('options')}\n{options}\n"
        f"{bold('more')}\n" + "".join(f"  {line}\n" for line in more)
    )


def _options() -> dict[str, str]:
    sizes = ", ".join(f"{name} ({preset.parameters / 1e6:.3g}M)" for name, preset in PRESETS.items())
    return {
        "--config FILE": "YAML file of keys; several may be given: later ones win, and the command line over all",
        "--preset NAME": f"a size with the learning rate and batch that follow, parameters beside the embedding: {sizes}; "
        "files and keys win over it; `--preset list` shows what each one sets",
        DRY_RUN: "everything up to the first step, the largest batch once, then memory and time; leaves no run",
        "--print_config": "print the resulting config as YAML",
        "--print_completion SHELL": f"print what completes keys and values at a TAB ({', '.join(SHELLS)})",
        VERSION: "print the package's version",
        "--help, -h [SECTION]": "this, or the keys of a section",
    }


def _section(name: str, kind: type, bold: Any) -> str:
    about = " ".join((kind.__doc__ or "").split())
    lines = [textwrap.fill(f"{bold(name)}: {about}" if name else about, _width()) + "\n"]
    for key in keys_of(name):
        lines.append(f"  {bold('--' + key)} {_placeholder(leaf_types()[key])} ({_default(key)})\n")
        lines.append(textwrap.indent(textwrap.fill(sentences_by_key()[key], _width() - 6), " " * 6) + "\n")
    return "".join(lines)


def _entry(words: str, text: str) -> str:
    """An option and what it does, in two columns."""
    first = f"  {words}".ljust(_COLUMN)
    begin = first if len(first) == _COLUMN else f"{first}\n{' ' * _COLUMN}"
    filled = textwrap.fill(text, _width() - _COLUMN, break_long_words=False, break_on_hyphens=False)
    return begin + filled.replace("\n", "\n" + " " * _COLUMN) + "\n"


def _width() -> int:
    """That of the terminal, if it is narrower than WIDTH; commands, to be copied, are not broken to fit."""
    return max(_COLUMN + 20, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def _short(key: str) -> str:
    """The beginning of what is said of a key, with what null means, and its default."""
    first, *others = sentences_by_key()[key].split(". ")[0].removesuffix(".").split("; ")
    return "; ".join([first, *(part for part in others if part.startswith("null:"))]) + f" ({_default(key)})"


def _default(key: str) -> str:
    section, _, name = key.rpartition(".")
    config = TrainingConfig()
    value = getattr(getattr(config, section) if section else config, name)
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _placeholder(kind: Any) -> str:
    """What is to be typed: `NUMBER`, `true|false`, `auto|fp32|bf16`."""
    words: list[str] = []
    for option in options_of(kind):
        if get_origin(option) is Literal:
            words += map(str, get_args(option))
        elif get_origin(option) is tuple:
            words.append("[NUMBER,NUMBER]")
        else:
            words.append({bool: "true|false", int: "N", float: "NUMBER"}.get(option, "TEXT"))
    return "|".join([*words, "null"] if may_be_null(kind) else words)


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m"
