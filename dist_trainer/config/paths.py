"""Paths that users write, paths in a run's folder, cache folders; and run names in a sweep."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dist_trainer.errors import ConfigError

RUN_CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
STATUS_FILE = "status.json"


def user_path(name: str) -> Path:
    """The path `name`, with a leading `~` or `~user` replaced by the home folder. A shell does that only for separate words,
    not in `--key=~/folder` or in a YAML file.

    Raises ConfigError if the home folder is unknown.
    """
    expanded = os.path.expanduser(name)
    if name.startswith("~") and expanded == name:
        raise ConfigError(f"{name!r}: the home folder {Path(name).parts[0]} is not known; write the path in full")
    return Path(expanded)


def is_same_path(first: object, second: object) -> bool:
    """Whether two config values are paths to the same place."""
    if not (isinstance(first, str) and isinstance(second, str)):
        return False
    return os.path.realpath(os.path.expanduser(first)) == os.path.realpath(os.path.expanduser(second))


def is_run_folder(path: Path) -> bool:
    """Whether `path` contains what every run's folder does: a config and a (perhaps empty) folder of checkpoints."""
    return (path / RUN_CONFIG).is_file() and (path / CHECKPOINTS).is_dir()


def has_checkpoints(run: Path) -> bool:
    """Whether the run folder `run`, which need not exist, has a checkpoint, valid or not."""
    return any((run / CHECKPOINTS).glob("step-*"))


def sweep_run_name(run_name: str, environment: Mapping[str, str] = os.environ) -> str:
    """`run_name` with the W&B id of a sweep's run appended; unchanged if `wandb agent` did not start this process.

    All runs of a sweep share one command line except for what the sweep varies: with one run_name, the second run would find
    the folder of the first and be rejected as another run. A preempted run gets the same id from W&B again, finds its folder,
    and resumes.
    """
    run_id = environment.get("WANDB_RUN_ID", "")
    if not environment.get("WANDB_SWEEP_ID") or not run_id or run_name.endswith(f"-{run_id}"):
        return run_name
    return f"{run_name}-{run_id}"


def default_cache_dir() -> Path:
    """The folder for files that can be recreated: DIST_TRAINER_CACHE if set, else dist_trainer/ in the user's cache folder."""
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
