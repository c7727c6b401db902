"""Copies from a GPU: read only once they are finished, in memory that is pinned once and reused. The GPU is a stand-in."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_trainer.checkpoint import host_copy
from dist_trainer.checkpoint.host_copy import PinnedMemory
from dist_trainer.checkpoint.state import Progress, Snapshot, take_snapshot
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.run import summary

GARBAGE = 77.0


class Model(nn.Module):
    """A tied weight, one with other strides than a file has, parts of a larger tensor, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.linear.weight = nn.Parameter(torch.randn(4, 6).t())
        self.other = nn.Linear(4, 6)
        self.other.weight = self.linear.weight
        self.register_buffer("part", torch.randn(10)[:5])
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.empty(0))


class Gpu:
    """Every tensor lies on it. Copies from it are made when they are awaited, and until then the host holds garbage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[tuple[Tensor, Tensor]] = []
        self.awaited = 0
        self.pinned: list[int] = []
        self.unpinned: list[int] = []
        monkeypatch.setattr(host_copy, "is_on_gpu", lambda tensor: True)
        monkeypatch.setattr(host_copy, "start_copy", self.start_copy)
        monkeypatch.setattr(host_copy, "await_copies", self.await_copies)
        monkeypatch.setattr(host_copy, "copies_done", lambda: SimpleNamespace(synchronize=self.await_copies))
        monkeypatch.setattr(host_copy, "pin", lambda memory: self.pinned.append(len(memory)) is None)
        monkeypatch.setattr(host_copy, "unpin", lambda memory: self.unpinned.append(len(memory)))

    def start_copy(self, to: Tensor, tensor: Tensor) -> None:
        to.fill_(GARBAGE)
        self.started.append((to, tensor))

    def await_copies(self) -> None:
        self.awaited += 1
        for to, tensor in self.started:
            to.copy_(tensor)
        self.started.clear()


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


@pytest.fixture
def take() -> Callable[..., Snapshot]:
    """A snapshot of one model after another step."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())

    def take_one(pinned: PinnedMemory | None, *, is_last: bool = False) -> Snapshot:
        model.linear(torch.ones(4)).sum().backward()
        optimizer.step()
        snapshot = take_snapshot(
            model,
            optimizer,
            scaler={},
            progress=Progress(1),
            metadata={},
            is_last=is_last,
            pinned=pinned,
        )
        assert all(torch.equal(snapshot.weights[name], tensor) for name, tensor in model.state_dict().items())
        averages = optimizer.state[model.linear.weight]["exp_avg"]
        assert torch.equal(snapshot.optimizer_tensors["linear.weight::exp_avg"], averages)
        return snapshot

    return take_one


def address(snapshot: Snapshot) -> int:
    return snapshot.weights["linear.weight"].data_ptr()


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("with_pinned_memory", [True, False])
def test_copies_are_contiguous_apart_and_read_only_when_they_are_finished(
    gpu, take, tmp_path: Path, with_pinned_memory, is_last
):
    snapshot = take(PinnedMemory() if with_pinned_memory else None, is_last=is_last)
    assert gpu.awaited == 1
    tensors = [*snapshot.weights.values(), *snapshot.optimizer_tensors.values()]
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors), "whole storages, as files have them"
    held = [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]
    assert len(set(held)) == len(held)
    save_file(snapshot.weights, tmp_path / "weights")
    assert all(torch.equal(tensor, snapshot.weights[name]) for name, tensor in load_file(tmp_path / "weights").items())


def test_memory_is_pinned_once_at_the_size_of_the_state_and_reused(gpu, take):
    pinned = PinnedMemory()
    addresses = set()
    for _ in range(3):
        snapshot = take(pinned)
        addresses.add(address(snapshot))
        num_bytes = sum(t.nbytes for t in (*snapshot.weights.values(), *snapshot.optimizer_tensors.values()))
        del snapshot
    assert len(addresses) == 1
    (size,) = gpu.pinned
    assert num_bytes <= size < num_bytes + 64 * 20
    assert gpu.unpinned == []
    del pinned
    assert gpu.unpinned == [size]


def test_a_snapshot_that_is_still_written_keeps_its_memory(gpu, take):
    pinned = PinnedMemory()
    first = take(pinned)
    before = {name: tensor.clone() for name, tensor in first.weights.items()}
    second = take(pinned)
    assert address(second) != address(first)
    assert all(torch.equal(first.weights[name], tensor) for name, tensor in before.items())
    freed = address(first)
    del first
    assert address(take(pinned)) == freed
    assert len(gpu.pinned) == 1


def test_copies_that_were_only_started_are_waited_for_by_who_reads_them_and_keep_their_memory(gpu):
    pinned, tensor = PinnedMemory(), torch.ones(10)
    copy = host_copy.start_host_copy({"x": tensor}, pinned=pinned)
    assert gpu.awaited == 0
    assert copy.tensors["x"].eq(GARBAGE).all()
    other = host_copy.start_host_copy({"x": tensor}, pinned=pinned)
    place = copy.tensors["x"].data_ptr()
    assert other.tensors["x"].data_ptr() != place
    assert torch.equal(copy.wait()["x"], tensor)
    del copy
    assert host_copy.start_host_copy({"x": tensor}, pinned=pinned).tensors["x"].data_ptr() == place


def test_on_a_cpu_copies_are_made_at_once():
    tensor = torch.ones(10)
    copy = host_copy.start_host_copy({"x": tensor, "tied": tensor}, pinned=PinnedMemory())
    tensor.zero_()
    assert {name: value.sum() for name, value in copy.wait().items()} == {"x": 10, "tied": 10}


def test_a_state_that_has_grown_gets_larger_memory_and_the_old_one_is_given_back(gpu):
    pinned = PinnedMemory()
    for size in (10, 1000, 10):
        taken, is_in_use = host_copy.to_host({"x": torch.ones(size)}, copies=True, pinned=pinned)
        assert is_in_use
        assert taken["x"].sum() == size
    assert gpu.pinned == [64, 4032]
    assert gpu.unpinned == [64]


@pytest.mark.parametrize("code", [0, 2, None])
def test_memory_that_cuda_does_not_pin_is_used_as_it_is(monkeypatch, caplog, code):
    """Through the one place that calls CUDA's runtime, `torch.cuda.cudart()`."""
    calls = []

    class Runtime:
        if code is not None:

            @staticmethod
            def cudaHostRegister(address, size, flags):
                calls.append(("register", address, size, flags))
                return code

            @staticmethod
            def cudaHostUnregister(address):
                calls.append(("unregister", address))
                return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: calls.append("cleared"))
    monkeypatch.setattr(host_copy.log, "propagate", True)
    pinned = PinnedMemory()
    with caplog.at_level(logging.WARNING):
        memory = pinned.take(100)
    assert isinstance(memory, mmap.mmap)
    del pinned
    registered = [call for call in calls if call[0] == "register"]
    assert [call[2:] for call in registered] == ([] if code is None else [(100, 0)])
    assert ("cleared" in calls) == (code == 2)
    assert any(call[0] == "unregister" for call in calls) == (code == 0)
    assert ("could not be pinned" in caplog.text) == (code != 0)


def test_the_header_of_a_run_on_gpus_says_how_much_host_memory_is_pinned(monkeypatch):
    model = nn.Linear(1024, 1024, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    world = SimpleNamespace(device=torch.device("cuda"))
    trainer = SimpleNamespace(model=model, parameters=[*model.parameters()], optimizer=optimizer, world=world)
    trainer.config, trainer.reduction = TrainingConfig(), SimpleNamespace(gradient_copies=0)
    monkeypatch.setattr(summary, "total_memory", lambda device: 80 << 30)
    said = summary.format_memory(trainer)
    assert said.endswith("cuda has 80.0 GiB; saves pin 12.0 MiB and digests 4.00 MiB of host memory on rank 0")
    world.device = torch.device("cpu")
    assert "pin" not in summary.format_memory(trainer)
