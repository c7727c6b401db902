"""The machine that a result was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "lightning")


def machine_and_versions() -> str:
    """Date, commit, processor or GPU, versions."""
    # Through a shell, so that a machine without git does not raise an error after everything has been measured.
    described = subprocess.run("git describe --always --dirty", shell=True, capture_output=True, text=True, cwd=ROOT)
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)
    return f"{datetime.date.today()}, commit {described.stdout.strip() or 'unknown'}, {machine()}, {versions}."


def machine() -> str:
    """The GPU's name, or without a GPU the processor's and its number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
