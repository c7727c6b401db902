"""Where a model may lie, for a path that means a model, a checkpoint, or a run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Any of them tells that a folder holds a tokenizer."""


def model_folders(path: Path) -> Iterator[Path]:
    """`path` itself, then the checkpoints in it or in its `checkpoints`: best, latest, and the others, newest first.

    None that a link leads to outside of `path`.
    """
    yield path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for candidate in (root / "best", root / "latest", *sorted(root.glob("step-*"), reverse=True)):
        if candidate.resolve().is_relative_to(path.resolve()):
            yield candidate
