"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """DIST_TRAINER_CACHE, else dist_trainer/ in the user's cache folder."""
    if named := os.environ.get("DIST_TRAINER_CACHE"):
        return Path(os.path.expanduser(named))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_trainer"
