"""Bytes that a run holds, and what is said when memory runs out."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_trainer.config.schema import BatchConfig, DataConfig, OptimConfig, PrecisionConfig, TrainingConfig
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import DoesNotFitError, OutOfMemoryError, RefusedError
from dist_trainer.optim.registry import build_optimizer
from dist_trainer.run.memory import (
    DeviceMemory,
    explain_out_of_memory,
    format_shortage,
    hints,
    hints_for_host,
    is_out_of_memory,
    optimizer_state_bytes,
    requested_bytes,
    snapshot_bytes,
)

GIB = 1 << 30
CPU = DistributedContext.single()
GPU = DistributedContext(rank=2, local_rank=2, world_size=4, local_world_size=4, device=torch.device("cuda", 2))
CONFIG = TrainingConfig(data=DataConfig(sequence_length=1024), batch=BatchConfig(global_batch_size=24, micro_batch_size=6))
CUDA_SAYS = "CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 79.19 GiB of which 5 MiB is free."


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_of_an_optimizer_is_known_before_its_first_step(name):
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = build_optimizer(OptimConfig(name=name), model)
    predicted = optimizer_state_bytes(optimizer)
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    steps = sum(1 for state in optimizer.state.values() if "step" in state)
    assert predicted == optimizer_state_bytes(optimizer) - 4 * steps > 0
    assert optimizer_state_bytes(torch.optim.SGD(model.parameters())) == 0


def from_allocating(act) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        act()
    return caught.value


@pytest.mark.parametrize(
    ("error", "requested"),
    [
        (from_allocating(lambda: torch.empty(1 << 50)), 1 << 52),
        (from_allocating(lambda: np.empty(1 << 50)), 1 << 53),
        (from_allocating(lambda: bytearray(1 << 60)), None),
        (torch.OutOfMemoryError(CUDA_SAYS), int(20.5 * (1 << 20))),
        (RuntimeError("CUDA error: out of memory"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_allocator_s_refusal_is_recognised(error, requested):
    assert is_out_of_memory(error)
    assert requested_bytes(error) == requested


def test_other_errors_are_not():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError("No space left on device"))
    with pytest.raises(RuntimeError, match="no memory of that") as caught, explain_out_of_memory(CONFIG, CPU):
        raise RuntimeError("no memory of that")
    assert not isinstance(caught.value, OutOfMemoryError)


def test_hints_name_only_what_can_be_lowered():
    full = TrainingConfig(data=CONFIG.data, batch=CONFIG.batch, precision=PrecisionConfig(dtype="fp32"))
    micro, dtype, reduction, length = hints(full, CPU)
    assert micro.startswith("a smaller --batch.micro_batch_size (now 6)")
    assert dtype.startswith("--precision.dtype bf16 (now fp32)")
    assert reduction.startswith("--distributed.reduction fast (now exact)")
    assert length.startswith("a smaller --data.sequence_length (now 1024)")
    smallest = TrainingConfig(data=CONFIG.data, batch=BatchConfig(4, None), precision=PrecisionConfig(dtype="bf16"))
    assert hints(smallest, DistributedContext(world_size=4)) == [length]
    assert hints_for_host(TrainingConfig(data=DataConfig(num_workers=4)), GPU)[:2] == [
        "fewer --data.num_workers (now 4): each is a process, on every rank",
        "fewer ranks per machine (now 4): each is a process with its own libraries",
    ]


def test_the_shortage_is_one_line_with_what_was_requested_and_what_there_is():
    full = DeviceMemory(total=80 * GIB, in_use=60 * GIB, peak=78 * GIB, others=16 * GIB)
    assert format_shortage(2 * GIB, full, rank=2, device=GPU.device) == (
        "rank 2 requested 2.00 GiB more on cuda:2, which has 80.0 GiB (60.0 GiB in use, peak 78.0 GiB, "
        "16.0 GiB held by other processes)"
    )


def test_memory_of_a_gpu_is_what_torch_and_the_driver_report(monkeypatch):
    numbers = {"memory_allocated": 60, "memory_reserved": 70, "max_memory_allocated": 65, "mem_get_info": (5, 80)}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
    assert DeviceMemory.of(GPU.device) == DeviceMemory(total=80, peak=65, in_use=60, fragmented=10, others=5)


def test_before_there_is_a_model_the_run_is_rejected(monkeypatch):
    with (
        pytest.raises(DoesNotFitError, match="out of memory before the first step") as caught,
        explain_out_of_memory(CONFIG, CPU),
    ):
        torch.empty(1 << 50)
    assert isinstance(caught.value, RefusedError)
    assert caught.value.exit_code == 2
    assert "a smaller --batch.micro_batch_size (now 6)" in str(caught.value)
    assert "\n" not in caught.value.summary
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (DoesNotFitError, str(caught.value))

    fragmented = DeviceMemory(total=8 << 50, in_use=0, peak=0, fragmented=8 << 50)
    monkeypatch.setattr(DeviceMemory, "of", lambda _: fragmented)
    with (
        pytest.raises(DoesNotFitError, match="PYTORCH_ALLOC_CONF=expandable_segments:True"),
        explain_out_of_memory(CONFIG, CPU),
    ):
        torch.empty(1 << 50)


def test_a_snapshot_is_the_weights_and_the_optimizer_s_state():
    model = nn.Linear(4, 3)
    trainer: Any = SimpleNamespace(model=model, optimizer=torch.optim.AdamW(model.parameters()))
    assert snapshot_bytes(trainer) == 15 * 4 * 3
