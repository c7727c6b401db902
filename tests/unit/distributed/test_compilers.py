"""Which compilers torch would call, and what of them a machine lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_trainer.distributed import compilers
from dist_trainer.distributed.compilers import missing_compiler

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    compilers._missing_on_gpu.cache_clear()
    yield
    compilers._missing_on_gpu.cache_clear()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of programs of a machine with Triton and a GPU for it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compilers, "has_triton", lambda: True)
    return tmp_path


def add_program(folder: Path, name: str) -> None:
    (folder / name).touch(mode=0o755)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_gpu_needs_a_c_compiler(machine: Path, name: str) -> None:
    assert "a C compiler" in str(missing_compiler(GPU))
    compilers._missing_on_gpu.cache_clear()
    add_program(machine, name)
    assert missing_compiler(GPU) is None


def test_a_gpu_needs_the_c_compiler_that_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_program(machine, "gcc")
    monkeypatch.setenv("CC", "mine")
    assert "a C compiler" in str(missing_compiler(GPU))
    compilers._missing_on_gpu.cache_clear()
    add_program(machine, "mine")
    assert missing_compiler(GPU) is None


def test_a_gpu_needs_triton_and_a_torch_that_cannot_say_is_believed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_program(machine, "gcc")
    monkeypatch.setattr(compilers, "has_triton", lambda: False)
    assert "triton" in str(missing_compiler(GPU))
    compilers._missing_on_gpu.cache_clear()
    monkeypatch.setattr(compilers, "has_triton", None)
    assert missing_compiler(GPU) is None


def test_torch_is_asked_about_triton_once_and_for_no_cpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(compilers, "has_triton", lambda: asked.append(1) or True)
    for name in ("gcc", "g++"):
        add_program(machine, name)
    assert missing_compiler(torch.device("cpu")) is None
    assert not asked
    assert [missing_compiler(GPU) for _ in range(2)] == [None, None]
    assert asked == [1]
