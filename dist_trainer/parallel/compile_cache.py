"""Where torch keeps what it compiles, and by what it finds it again."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dist_trainer.storage.cache_dir import default_cache_dir


def enable_compile_cache() -> None:
    """Have torch keep what it compiles in the user's cache, so that a run that starts again finds it, on any node.

    Not in the run's folder: it is code, and a run may come from a stranger. For the same reason not in a folder that others
    can write into; there, and where the user has named one, torch's own choice stands.
    """
    folder = default_cache_dir() / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    if belongs_to_this_user_alone(folder):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        if torch.cuda.is_available():
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def belongs_to_this_user_alone(folder: Path) -> bool:
    """Whether `folder` is no link, and nobody else may write into it."""
    found = folder.lstat()
    return not folder.is_symlink() and found.st_uid == os.getuid() and not found.st_mode & 0o022


def number_format_in_key(name: str) -> AbstractContextManager[object]:
    """Within, this thread looks for compiled code only among that of the number format `name`.

    torch 2.11 takes a graph that was compiled under autocast to bfloat16 for the same one under autocast to float16, and
    computes in the wrong format without a word; 2.13 does not.
    """
    config: Any = torch.compiler.config
    if not hasattr(config, "cache_key_tag"):
        return nullcontext()
    return config.patch(cache_key_tag=f"{config.cache_key_tag} {name}".strip())
