"""How many CPUs this process may use: those it may run on, and no more than a container's quota pays for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_USUAL_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")


def usable_cpus(root: Path = Path("/")) -> int:
    """1 or more; `root` is where /proc is.

    Neither `os.cpu_count` nor OpenMP knows of quotas (`docker run --cpus`, Kubernetes' limits.cpu): a thread for each core of
    the machine then waits most of the time for its share. A quota of 2.5 CPUs keeps 2 threads busy.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *map(int, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """In CPUs, of this process's control group and all around it; none where nothing limits, or not on Linux."""
    # Where they usually are, too: what a sandbox says of its mounts may be anything.
    for usual in _USUAL_MOUNTS:
        yield from _quota_of(root / usual)
    for folder, mount in _groups(root):
        while True:
            yield from _quota_of(folder)
            if folder == mount:
                break
            folder = folder.parent


def _groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """The folder of this process's control group, and the mount that it lies in; of cgroup v2, of v1's `cpu`, or of both."""
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
            # A container often sees its own group as the root of the mount, and is told its path outside.
            group = mount / paths[kind].removeprefix(within).lstrip("/")
            yield (group if group.is_dir() else mount), mount


def _quota_of(folder: Path) -> Iterator[float]:
    """Of one control group: cpu.max of v2 ("250000 100000", or "max 100000"), else the two files of v1 (-1: none)."""
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
