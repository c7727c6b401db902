"""What a run ran on: code, versions, machine. No secrets: no environment variables, user names or remote addresses."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dist_trainer.config.secrets import masked_command
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.distributed.machine import device_name, usable_cpus
from dist_trainer.version import __version__

_GIT_TIMEOUT_SECONDS = 5.0
_PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "wandb", "numpy")


def describe_environment(world: DistributedContext) -> dict[str, Any]:
    """Metadata for the report and W&B, by name; unknown values are None."""
    return {
        "dist_trainer": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        **describe_commit(),
        **{f"dist_trainer_{key}": value for key, value in describe_own_commit().items()},
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "device": device_name(world.device),
        "cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "world_size": world.world_size,
        "local_world_size": world.local_world_size,
        "command": shlex.join(masked_command(sys.orig_argv)),
        "folder": str(Path.cwd()),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def describe_commit(folder: Path | None = None) -> dict[str, Any]:
    """Commit of the repository around `folder` (the working folder), and whether tracked files differ from it.

    Both None without git or a repository, or if git does not answer within seconds.
    """
    unknown = {"git_commit": None, "git_dirty": None}
    try:
        answer = subprocess.run(
            ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no"],
            cwd=folder,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    lines = answer.stdout.decode(errors="replace").splitlines()
    commits = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
    if not commits or commits[0] == "(initial)":
        return unknown
    return {"git_commit": commits[0], "git_dirty": any(not line.startswith("#") for line in lines)}


def describe_own_commit(file: Path = Path(__file__)) -> dict[str, Any]:
    """The same for the repository that contains this package's code.

    Both None if `file` is not tracked: an installed package may be inside an unrelated repository.
    """
    try:
        command = ["git", "ls-files", "--error-unmatch", "--", file.name]
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": _GIT_TIMEOUT_SECONDS}
        subprocess.run(command, cwd=file.resolve().parent, check=True, **options)
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}
    return describe_commit(file.resolve().parent)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
