"""Out of memory: who had how much, and what would most likely help."""

from __future__ import annotations

import logging
import os
import re
import resource
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.sampler import rows_per_micro_batch
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import DoesNotFitError, OutOfMemoryError
from dist_trainer.optim.registry import optimizer_state_bytes
from dist_trainer.parallel.registry import unwrap
from dist_trainer.tracking.formatting import memory
from dist_trainer.tracking.throughput import peak_memory_bytes
from dist_trainer.training.precision import build_precision, emulates_bf16
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)

NUM_REMEDIES = 3
STATE_HEAVY = 0.8
"""Share of the memory beyond which weights, gradients and optimizer leave too little for any batch."""

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
_ON_GPU = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory")
_ASKED = re.compile(r"allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB|PiB)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine had no memory left: by torch's allocators, CUDA's own, numpy's or Python's."""
    return _is_of_host(error) or isinstance(error, torch.OutOfMemoryError) or bool(_ON_GPU.search(str(error)))


def _is_of_host(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def asked_bytes(error: BaseException) -> int | None:
    """How much was asked for in vain; None where `error` does not say."""
    match = _ASKED.search(str(error))
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


@dataclass(frozen=True)
class MemoryNumbers:
    """Of one rank, in bytes."""

    asked: int | None
    """In vain."""
    total: int
    """What the device has, or what this process may have of it."""
    in_use: int
    """When it was asked: by tensors on a GPU, by the whole process on a CPU."""
    peak: int
    """The most that has been in use."""
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    """What the optimizer keeps, or is going to."""
    unused: int = 0
    """Taken from the GPU by torch's allocator, in pieces that are too small."""
    others: int = 0
    """Held on the GPU by other processes."""

    @property
    def state(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer


def measure(error: BaseException, device: torch.device, trainer: Trainer | None = None) -> MemoryNumbers:
    """The numbers at the moment of `error`, while all that led to it is still held; `device` is the one that had no more."""
    asked, state = asked_bytes(error), {} if trainer is None else state_bytes(trainer)
    peak = peak_memory_bytes(device)
    if device.type != "cuda":
        return MemoryNumbers(asked, total_memory(device), _resident_bytes(otherwise=peak), peak, **state)
    free, total = torch.cuda.mem_get_info(device)
    in_use, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    others = max(0, total - free - reserved)
    return MemoryNumbers(asked, total, in_use, peak, **state, unused=reserved - in_use, others=others)


def state_bytes(trainer: Trainer) -> dict[str, int]:
    """What one rank holds whatever the batch, in bytes: `weights`, `gradients`, `optimizer`."""
    return {
        "weights": _bytes_of([*trainer.model.parameters(), *trainer.model.buffers()]),
        "gradients": _bytes_of(trainer.parameters),
        "optimizer": _optimizer_bytes(trainer.optimizer),
    }


def snapshot_bytes(trainer: Trainer) -> int:
    """Bytes of host memory that a save on rank 0 copies weights and optimizer state into; from a GPU that memory is pinned at
    the first save and kept.
    """
    return _bytes_of(unwrap(trainer.model).state_dict().values()) + _optimizer_bytes(trainer.optimizer)


def total_memory(device: torch.device) -> int:
    """Bytes that a GPU has; of a CPU those of the machine, or this process's limit (ulimit -v) where that is lower."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return installed if limit == resource.RLIM_INFINITY else min(installed, limit)


def remedies(config: TrainingConfig, world: DistributedContext, numbers: MemoryNumbers, *, dtype: str) -> list[str]:
    """The settings most likely to help in this run, best first; `dtype` is what it computes in."""
    found: list[str] = []
    if world.device.type == "cuda" and numbers.asked is not None and numbers.unused >= 2 * numbers.asked:
        found.append(
            f"PYTORCH_ALLOC_CONF=expandable_segments:True in the environment: {memory(numbers.unused)} are free, "
            "but in pieces that are too small"
        )
    smaller_model, smaller_batch = list(_smaller_models(config)), list(_smaller_batches(config, world, dtype=dtype))
    if numbers.state > STATE_HEAVY * numbers.total:
        return found + smaller_model + smaller_batch
    return found + smaller_batch + smaller_model


def remedies_for_host(config: TrainingConfig, world: DistributedContext) -> list[str]:
    """The same for a run on GPUs that ran out of the machine's own memory, where batches and models are not."""
    found = []
    if config.data.num_workers > 0:
        found.append(f"--data.num_workers 0 (it is {config.data.num_workers}): each is a process, on every rank")
    if world.local_world_size > 1:
        found.append(f"fewer ranks on a machine (it has {world.local_world_size}): each is a process with libraries of its own")
    return [*found, "more memory for the job: a save copies weights and optimizer into the machine's memory"]


def _smaller_batches(config: TrainingConfig, world: DistributedContext, *, dtype: str) -> Iterator[str]:
    micro = rows_per_micro_batch(config.batch, world.world_size)
    if micro > 1:
        fewer = max(size for size in range(1, micro // 2 + 1) if micro % size == 0)
        same = "the losses stay the same" if config.model.dropout == 0 else "the losses stay the same but for dropout's masks"
        yield (
            f"--batch.micro_batch_size {fewer} (it is {micro}): the same global batch of {config.batch.global_batch_size} "
            f"in smaller parts; {same}, and the run can go on with it"
        )
    name = "bf16" if not emulates_bf16(world.device) else "fp16" if world.device.type == "cuda" else None
    if dtype == "fp32" and name is not None:
        yield f"--precision.dtype {name} (it is fp32): activations take about half; the run can go on with it"
    length = config.data.sequence_length
    if length > 1:
        yield (
            f"--data.sequence_length {length // 2} (it is {length}): activations and logits take half; "
            "that is another run, with a --run_name of its own"
        )


def _smaller_models(config: TrainingConfig) -> Iterator[str]:
    if config.model.name != "decoder_lm" or config.model.init_from is not None:
        return
    layers, hidden = config.model.num_hidden_layers, config.model.hidden_size
    if layers > 1:
        what = "a smaller model, which is another run, with a --run_name of its own"
        yield f"--model.num_hidden_layers {layers // 2} (it is {layers}, of width {hidden}): {what}"


@contextmanager
def explaining_out_of_memory(
    config: TrainingConfig, world: DistributedContext, trainer: Trainer | None = None
) -> Generator[None]:
    """Raise OutOfMemoryError with numbers and remedies where memory runs out inside; without a trainer DoesNotFitError.

    Each rank but the first, which says everything, prints the one line that tells its own numbers.
    """
    explained: OutOfMemoryError | None = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        explained = explain(error, config, world, trainer)
    if explained is not None:  # only here: what the error's frames held is free again, for the last words
        if not world.is_main:
            log.error("%s", explained.summary)
            log.info("%s", explained.advice)  # into its log file: consoles show warnings of these ranks
        raise explained


def explain(
    error: BaseException, config: TrainingConfig, world: DistributedContext, trainer: Trainer | None
) -> OutOfMemoryError:
    """What `error` means in this run."""
    device = torch.device("cpu") if _is_of_host(error) else world.device
    numbers = measure(error, device, trainer)
    if trainer is None:
        when, dtype = "before the first step", build_precision(config.precision, world.device).name
    else:
        when = f"in step {trainer.progress.step + 1}, {world.heartbeat.phase}"
        dtype = trainer.precision.name
    summary = f"out of memory {when}: {in_words(numbers, world, device)}"
    advice = [] if trainer is None else [f"  {state_in_words(numbers, trainer)}"]
    on_device = device == world.device
    helpful = remedies(config, world, numbers, dtype=dtype) if on_device else remedies_for_host(config, world)
    advice += ["most likely to help, the first first:", *(f"  {remedy}" for remedy in helpful[:NUM_REMEDIES])]
    kind = DoesNotFitError if trainer is None else OutOfMemoryError
    return kind(summary, "\n".join(advice))


def in_words(numbers: MemoryNumbers, world: DistributedContext, device: torch.device) -> str:
    """The numbers, as a part of a sentence."""
    asked = "more" if numbers.asked is None else f"{memory(numbers.asked)} more"
    where = f"of the machine's {memory(numbers.total)}" if device.type == "cpu" else f"of {device}'s {memory(numbers.total)}"
    others = f", {memory(numbers.others)} held by other processes" if numbers.others > numbers.total / 20 else ""
    used = f"{memory(numbers.in_use)} in use, {memory(numbers.peak)} at most so far{others}"
    return f"rank {world.rank} wanted {asked} {where} ({used})"


def state_in_words(numbers: MemoryNumbers, trainer: Trainer) -> str:
    """What the model takes whatever the batch, and how large the logits of a micro-batch are: tokens * words * 4 bytes."""
    state = (
        f"weights {memory(numbers.weights)}, gradients {memory(numbers.gradients)}, optimizer {memory(numbers.optimizer)}; "
        "the rest goes with the micro-batch"
    )
    words, length = getattr(unwrap(trainer.model), "vocabulary_size", None), trainer.config.data.sequence_length
    if not isinstance(words, int):
        return state
    rows = trainer.sampler.micro_batch_size
    logits = memory(4 * rows * length * words)
    return f"{state}: its logits in float32, {rows} x {length} tokens x {words} words, would be {logits} all at once"


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizer_bytes(optimizer: Optimizer) -> int:
    """What it holds, or, before its first step, will hold."""
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return _bytes_of(held) if held else optimizer_state_bytes(optimizer)


def _resident_bytes(*, otherwise: int) -> int:
    if sys.platform != "linux":
        return otherwise
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
