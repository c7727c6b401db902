"""CPU quotas of containers, in cgroup v1 and v2, and the compilers that torch needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_trainer.config.schema import DistributedConfig
from dist_trainer.distributed import context as world
from dist_trainer.distributed import machine
from dist_trainer.distributed.context import init_distributed
from dist_trainer.distributed.machine import missing_compiler, usable_cpus

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1 = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
HYBRID_V2 = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"


def system(root: Path, membership: str, mounts: list[str], files: dict[str, str]) -> Path:
    """A root folder with these /proc/self/cgroup and mountinfo, and `files` under /sys/fs/cgroup."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/self/cgroup": membership, "proc/self/mountinfo": "\n".join(mounts), **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 16), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 16), ("?", 16)],
)
def test_a_quota_of_cgroup_v2(tmp_path: Path, quota: str, cpus: int) -> None:
    """As a container sees it: its own group is the root."""
    assert usable_cpus(system(tmp_path, "0::/", [V2], {"cpu.max": quota})) == cpus


def test_the_least_quota_of_all_groups_around_a_process_counts(tmp_path: Path) -> None:
    files = {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000", "cpu.max": "800000 100000"}
    assert usable_cpus(system(tmp_path, "0::/a/b", [V2], files)) == 3


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 16), ("400000", 4), ("150000", 1)])
def test_a_quota_of_cgroup_v1(tmp_path: Path, quota: str, cpus: int) -> None:
    """In a mount of its own; the cgroup v2 hierarchy next to it has no cpu.max."""
    membership = "5:memory:/elsewhere\n4:cpu,cpuacct:/docker/12\n0::/docker/12"
    files = {"cpu,cpuacct/docker/12/cpu.cfs_quota_us": quota, "cpu,cpuacct/docker/12/cpu.cfs_period_us": "100000"}
    files |= {"memory/elsewhere/x": "", "unified/docker/12/x": ""}
    assert usable_cpus(system(tmp_path, membership, [MEMORY, V1.format(root="/"), HYBRID_V2], files)) == cpus


@pytest.mark.parametrize("root", ["/docker/12", "/"])
def test_a_container_that_sees_its_own_group_as_the_root_of_the_mount(tmp_path: Path, root: str) -> None:
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    assert usable_cpus(system(tmp_path, "4:cpu,cpuacct:/docker/12", [V1.format(root=root)], files)) == 2


def test_a_sandbox_that_shows_a_quota_at_its_usual_place_alone(tmp_path: Path) -> None:
    mount = "30 23 0:26 / /sys/fs/cgroup ro - tmpfs none ro"
    assert usable_cpus(system(tmp_path, "0::/", [mount], {"cpu.max": "300000 100000"})) == 3


def test_without_control_groups_those_count_that_the_process_may_run_on(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path) == 16
    assert usable_cpus(system(tmp_path, "1:name=systemd:/", [], {})) == 16


@pytest.mark.parametrize(("omp", "threads"), [(None, 2), ("5", 5)])
def test_torch_computes_and_compiles_with_no_more_threads_than_the_quota_pays_for(
    monkeypatch: pytest.MonkeyPatch, omp: str | None, threads: int
) -> None:
    """OpenMP and torch's compiler count all cores of the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    before = torch.get_num_threads()
    monkeypatch.setattr(world, "usable_cpus", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    try:
        torch.set_num_threads(5)
        with init_distributed(DistributedConfig()):
            assert torch.get_num_threads() == threads
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "2"
    finally:
        torch.set_num_threads(before)


GPU = torch.device("cuda")
HAS_TRITON = machine._has_triton


@pytest.fixture
def empty_cache() -> Iterator[None]:
    machine._missing_on_gpu.cache_clear()
    yield
    machine._missing_on_gpu.cache_clear()


@pytest.fixture
def programs(empty_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of programs of a machine with Triton and a GPU for it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine, "_has_triton", lambda: True)
    return tmp_path


def add_program(folder: Path, name: str) -> None:
    (folder / name).touch(mode=0o755)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_gpu_needs_a_c_compiler(programs: Path, name: str) -> None:
    assert "a C compiler" in str(missing_compiler(GPU))
    machine._missing_on_gpu.cache_clear()
    add_program(programs, name)
    assert missing_compiler(GPU) is None


def test_a_gpu_needs_the_c_compiler_that_is_named(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_program(programs, "gcc")
    monkeypatch.setenv("CC", "mine")
    assert "a C compiler" in str(missing_compiler(GPU))
    machine._missing_on_gpu.cache_clear()
    add_program(programs, "mine")
    assert missing_compiler(GPU) is None


def test_a_gpu_needs_triton_and_a_torch_that_cannot_say_is_believed(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_program(programs, "gcc")
    monkeypatch.setattr(machine, "_has_triton", lambda: False)
    assert "triton" in str(missing_compiler(GPU))
    machine._missing_on_gpu.cache_clear()
    monkeypatch.setattr(machine, "_has_triton", HAS_TRITON)
    monkeypatch.setitem(sys.modules, "torch.utils._triton", None)
    assert missing_compiler(GPU) is None


def test_torch_is_queried_about_triton_once_and_for_no_cpu(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(machine, "_has_triton", lambda: calls.append(1) or True)
    for name in ("gcc", "g++"):
        add_program(programs, name)
    assert missing_compiler(torch.device("cpu")) is None
    assert not calls
    assert [missing_compiler(GPU) for _ in range(2)] == [None, None]
    assert calls == [1]
