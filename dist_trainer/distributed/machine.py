"""Facts about this machine: CPUs that this process may use, compilers that torch calls, and the device's name.

Imported before torch, by launch files too.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_USUAL_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")


def usable_cpus(root: Path = Path("/")) -> int:
    """How many CPUs this process may use: those it may run on, up to the container's quota; at least 1. `root` contains /proc.

    Neither `os.cpu_count` nor OpenMP respects quotas (`docker run --cpus`, Kubernetes' limits.cpu): with one thread per core of
    the machine, threads would spend most of their time throttled. A quota of 2.5 CPUs keeps 2 threads busy.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *map(int, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Quotas in CPUs of this process's control group and all its ancestors; none if unlimited, or not on Linux."""
    # Also try the usual mounts: what a sandbox reports about its mounts may be wrong.
    for usual in _USUAL_MOUNTS:
        yield from _quota_of(root / usual)
    for folder, mount in _groups(root):
        while True:
            yield from _quota_of(folder)
            if folder == mount:
                break
            folder = folder.parent


def _groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """The folder of this process's control group and the mount it is in, of cgroup v2, of v1's `cpu`, or of both."""
    try:
        memberships = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    paths = {"cgroup" if names else "cgroup2": path for _, names, path in memberships if not names or _has_cpu(names)}
    for line in mounts:
        # ID PARENT DEVICE ROOT MOUNT OPTIONS [FIELDS...] - TYPE SOURCE SUPER-OPTIONS
        first, _, last = line.partition(" - ")
        kind, _, options = last.partition(" ")
        if kind in paths and (kind == "cgroup2" or _has_cpu(options.split()[-1])):
            within, at = first.split()[3:5]
            mount = root / at.lstrip("/")
            # A container often sees its own group as the root of the mount, but gets the path as seen from outside.
            group = mount / paths[kind].removeprefix(within).lstrip("/")
            yield (group if group.is_dir() else mount), mount


def _quota_of(folder: Path) -> Iterator[float]:
    """Quota of one control group: v2's cpu.max ("250000 100000", or "max 100000"), else v1's two files (-1: none)."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return


def _has_cpu(controllers: str) -> bool:
    return "cpu" in controllers.split(",")


def device_name(device: torch.device) -> str:
    """The GPU's or CPU's model name."""
    if device.type == "cuda":
        from torch.cuda import get_device_name

        return get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs for `device` and this machine lacks, with the remedy; None if nothing is missing."""
    if device.type == "cuda":
        return _missing_on_gpu()
    # The compiler that torch would choose for CPU code.
    if _find_program([os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]):
        return None
    return (
        "a C++ compiler on a CPU, and there is neither g++ nor clang++; install one, set CXX to one, "
        "or set precision.compile to false"
    )


@cache
def _missing_on_gpu() -> str | None:
    """Cached: asking torch about Triton imports Triton's compiler, which takes seconds."""
    # The compiler that Triton would choose to build its launcher.
    if _find_program([os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]) is None:
        return (
            "a C compiler on a GPU, with which Triton builds its launcher, and there is neither gcc nor clang; install one, "
            "set CC to one, or set precision.compile to false"
        )
    if not _has_triton():
        return (
            "the package triton and a GPU that it supports (compute capability 7.0 or higher), and torch finds none; "
            "install a torch build that includes triton, or set precision.compile to false"
        )
    return None


def _has_triton() -> bool:
    """Whether torch finds Triton and a supported GPU, by a private function of torch; True if this torch lacks the function."""
    try:
        from torch.utils._triton import has_triton
    except ImportError:
        return True
    return has_triton()


def _find_program(names: list[str]) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)
