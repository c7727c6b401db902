"""What is said when memory runs out: the numbers, and what would help in this run."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from dist_trainer.config.schema import BatchConfig, DataConfig, ModelConfig, TrainingConfig
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import DoesNotFitError, OutOfMemoryError, RefusedError
from dist_trainer.run.memory import (
    MemoryNumbers,
    asked_bytes,
    explaining_out_of_memory,
    in_words,
    is_out_of_memory,
    remedies,
    remedies_for_host,
)

GIB = 1 << 30
CPU = DistributedContext.single()
GPU = DistributedContext(rank=2, local_rank=2, world_size=4, local_world_size=4, device=torch.device("cuda", 2))
CONFIG = TrainingConfig(
    model=ModelConfig(num_hidden_layers=8),
    data=DataConfig(sequence_length=1024),
    batch=BatchConfig(global_batch_size=24, micro_batch_size=6),
)
ROOMY = MemoryNumbers(asked=2 * GIB, total=80 * GIB, in_use=78 * GIB, peak=79 * GIB, weights=4 * GIB)
CUDA_SAYS = "CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 79.19 GiB of which 5 MiB is free."


def from_allocating(act) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        act()
    return caught.value


@pytest.mark.parametrize(
    ("error", "asked"),
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
def test_every_allocator_s_refusal_is_known(error, asked):
    assert is_out_of_memory(error)
    assert asked_bytes(error) == asked


def test_other_errors_are_not():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError("No space left on device"))


@pytest.mark.parametrize("emulates", [False, True])
def test_a_smaller_micro_batch_comes_first_then_a_format_that_is_not_emulated_then_rows(monkeypatch, emulates):
    monkeypatch.setattr("dist_trainer.run.memory.emulates_bf16", lambda device: emulates)
    first, *formats, third, fourth = remedies(CONFIG, CPU, ROOMY, dtype="fp32")
    assert first.startswith("--batch.micro_batch_size 3 (it is 6): the same global batch of 24")
    assert "the losses stay the same" in first
    assert [words.startswith("--precision.dtype bf16 (it is fp32)") for words in formats] == ([] if emulates else [True])
    assert third.startswith("--data.sequence_length 512 (it is 1024)")
    assert fourth.startswith("--model.num_hidden_layers 4 (it is 8, of width 192)")


def test_only_what_can_be_lowered_is_named():
    smallest = TrainingConfig(batch=BatchConfig(4, None), data=CONFIG.data, model=ModelConfig(num_hidden_layers=1))
    (only,) = remedies(smallest, DistributedContext(world_size=4), ROOMY, dtype="bf16")
    assert only.startswith("--data.sequence_length 512")


@pytest.mark.parametrize(("micro", "fewer"), [(6, 3), (7, 1), (9, 3), (2, 1)])
def test_the_smaller_micro_batch_divides_the_batch_as_the_larger_one_did(micro, fewer):
    config = TrainingConfig(batch=BatchConfig(micro * 4, micro))
    assert remedies(config, CPU, ROOMY, dtype="bf16")[0].startswith(f"--batch.micro_batch_size {fewer} ")


def test_where_the_model_alone_fills_the_memory_a_smaller_one_comes_first():
    full = MemoryNumbers(asked=GIB, total=80 * GIB, in_use=79 * GIB, peak=79 * GIB, weights=18 * GIB, optimizer=50 * GIB)
    assert remedies(CONFIG, CPU, full, dtype="bf16")[0].startswith("--model.num_hidden_layers 4")


def test_memory_in_pieces_that_are_too_small_is_told_first():
    torn = MemoryNumbers(asked=GIB, total=80 * GIB, in_use=60 * GIB, peak=70 * GIB, unused=18 * GIB)
    assert remedies(CONFIG, GPU, torn, dtype="bf16")[0].startswith("PYTORCH_ALLOC_CONF=expandable_segments:True")


def test_the_machine_s_own_memory_has_other_remedies_than_a_gpu_s():
    config = TrainingConfig(data=DataConfig(num_workers=4))
    assert remedies_for_host(config, GPU)[:2] == [
        "--data.num_workers 0 (it is 4): each is a process, on every rank",
        "fewer ranks on a machine (it has 4): each is a process with libraries of its own",
    ]


def test_the_numbers_stand_in_one_line():
    numbers = MemoryNumbers(asked=2 * GIB, total=80 * GIB, in_use=60 * GIB, peak=78 * GIB, others=16 * GIB)
    assert in_words(numbers, GPU, GPU.device) == (
        "rank 2 wanted 2.00 GiB more of cuda:2's 80.0 GiB (60.0 GiB in use, 78.0 GiB at most so far, "
        "16.0 GiB held by other processes)"
    )


def test_before_there_is_a_model_the_run_is_refused():
    with (
        pytest.raises(DoesNotFitError, match="out of memory before the first step") as caught,
        explaining_out_of_memory(CONFIG, CPU),
    ):
        torch.empty(1 << 50)
    assert isinstance(caught.value, RefusedError)
    assert caught.value.exit_code == 2
    assert "--batch.micro_batch_size 3" in str(caught.value)
    assert "\n" not in caught.value.summary
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (DoesNotFitError, str(caught.value))


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="no memory of that") as caught, explaining_out_of_memory(CONFIG, CPU):
        raise RuntimeError("no memory of that")
    assert not isinstance(caught.value, OutOfMemoryError)
