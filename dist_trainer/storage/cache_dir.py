"""The folder for files that can be recreated, and a home folder for libraries that need one."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path


def default_cache_dir() -> Path:
    """DIST_TRAINER_CACHE if set, else dist_trainer/ in the user's cache folder."""
    if named := os.environ.get("DIST_TRAINER_CACHE"):
        return Path(os.path.expanduser(named))
    ensure_home()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_trainer"


def ensure_home() -> None:
    """Set HOME and LOGNAME if neither the environment nor the system has them, as in a container with an arbitrary user id:
    libraries would fail, or create a folder named `~`.
    """
    try:
        Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir()) / f"home-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        is_ours = home.lstat().st_uid == os.getuid()  # anyone can create a folder of that name there
        os.environ["HOME"] = str(home) if is_ours else tempfile.mkdtemp(prefix=home.name)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())
