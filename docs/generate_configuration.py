"""Writes docs/configuration.md and configs/default.yaml from the dataclasses of dist_trainer/config/schema.py.

python docs/generate_configuration.py
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dist_trainer.config.keys import sentences
from dist_trainer.config.schema import TrainingConfig

ROOT = Path(__file__).resolve().parent.parent
MARKDOWN, YAML = ROOT / "docs" / "configuration.md", ROOT / "configs" / "default.yaml"

MARKDOWN_HEAD = """# Configuration

Every key, its default and its meaning; made from the dataclasses by `python docs/generate_configuration.py`. Keys are set in
YAML files (`--config FILE`, several of them, later ones win) or on the command line (`--section.key VALUE`), which wins
over files; `--preset NAME` sets a size, and all of these win over it ([commands.md](commands.md)). `--print_config` shows the
result. All problems of a config come in one message, with file and line.
"""
YAML_HEAD = """# The default config, whole: a small DecoderLM on six novels by Jane Austen, both inside the package.
# Made by `python docs/generate_configuration.py`; copy it and change what you like, or name only what differs.
"""


def sections(config: TrainingConfig) -> Iterator[tuple[str, Any]]:
    """Name and value of each section; the keys outside of any come first, under an empty name."""
    yield "", config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield field.name, value


def keys(section: Any) -> Iterator[tuple[str, str, str]]:
    """Name, default as YAML, and sentence of each key of a section."""
    said = sentences(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            continue
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
        yield field.name, text, said[field.name]


def markdown() -> str:
    """The page."""
    parts = [MARKDOWN_HEAD]
    for name, section in sections(TrainingConfig()):
        first_line = " ".join((type(section).__doc__ or "").split())
        parts.append(f"\n## {name or 'The run'}\n\n{first_line}\n\n| key | default | |\n|---|---|---|\n")
        for key, default, sentence in keys(section):
            escaped = sentence.replace("|", "\\|")
            parts.append(f"| `{name + '.' if name else ''}{key}` | `{default}` | {escaped} |\n")
    return "".join(parts)


def default_yaml() -> str:
    """The file, with the sentence above each key."""
    lines = [YAML_HEAD]
    for name, section in sections(TrainingConfig()):
        indent = "  " if name else ""
        if name:
            lines.append(f"\n{name}:")
        for key, default, sentence in keys(section):
            lines += textwrap.wrap(sentence, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            lines.append(f"{indent}{key}: {default}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    MARKDOWN.write_text(markdown(), encoding="utf-8")
    YAML.write_text(default_yaml(), encoding="utf-8")
