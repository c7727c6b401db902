"""Where a model may lie, for a path that means a model, a checkpoint, or a run's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Any of them tells that a folder holds a tokenizer."""


def model_folders(path: Path) -> Iterator[Path]:
    """`path` itself, then the checkpoints in it or in its `checkpoints`: best, latest, and the others, newest first.

    Where `best` is missing, as on file systems without links, it is the one that status.json names. None that a link leads to
    outside of `path`.
    """
    yield path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    best = root / "best" if (root / "best").exists() else root / _best_by_status(path)
    for candidate in (best, root / "latest", *sorted(root.glob("step-*"), reverse=True)):
        if candidate.resolve().is_relative_to(path.resolve()):
            yield candidate


def _best_by_status(run: Path) -> str:
    """The name of the best checkpoint by the status of the run folder `run`; `best` where that names none."""
    status = run / "status.json"
    try:
        step = json.loads(status.read_bytes())["best_step"] if status.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        step = None
    return f"step-{step:08d}" if type(step) is int else "best"
