"""Memory in bytes: the size of a run's state, of a device's memory, and the message when it runs out."""

from __future__ import annotations

import logging
import os
import re
import resource
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.sampler import accumulation_steps, sequences_per_micro_batch
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import DoesNotFitError, OutOfMemoryError
from dist_trainer.optim.muon import MuonWithAdamW
from dist_trainer.parallel.registry import unwrap
from dist_trainer.tracking.formatting import memory
from dist_trainer.tracking.throughput import peak_memory_bytes
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)

AVERAGES = {torch.optim.Adam: 2, torch.optim.Muon: 1}
"""Running averages that an optimizer keeps for each parameter."""
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
_ON_GPU = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory")
_REQUESTED = re.compile(r"allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB|PiB)")


# ------------------------------------------------------------------------------------------------ sizes


def state_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes on each rank at any batch size: `weights`, `gradients`, their `partial sums` (if any), and `optimizer`."""
    gradients = _bytes_of(trainer.parameters)
    partial_sums = trainer.reduction.gradient_copies * gradients
    return {
        "weights": _bytes_of([*trainer.model.parameters(), *trainer.model.buffers()]),
        "gradients": gradients,
        **({"partial sums": partial_sums} if partial_sums else {}),
        "optimizer": optimizer_state_bytes(trainer.optimizer),
    }


def snapshot_bytes(trainer: Trainer) -> int:
    """Bytes of host memory into which rank 0 copies weights and optimizer state when it saves. With a GPU, it is pinned
    at the first save and kept.
    """
    return _bytes_of(unwrap(trainer.model).state_dict().values()) + optimizer_state_bytes(trainer.optimizer)


def digest_bytes(trainer: Trainer) -> int:
    """Bytes of host memory that rank 0 copies weights into for digests, apart from saves; 0 if only checkpoints have one."""
    return _bytes_of(unwrap(trainer.model).state_dict().values()) if trainer.config.tracking.digest_every_steps else 0


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state; before its first step, an estimate: the running averages that AdamW and Muon will keep (0
    for other optimizers).
    """
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    if held:
        return _bytes_of(held)
    if isinstance(optimizer, MuonWithAdamW):
        return sum(map(optimizer_state_bytes, optimizer.parts))
    averages = next((count for kind, count in AVERAGES.items() if isinstance(optimizer, kind)), 0)
    return averages * sum(_bytes_of(group["params"]) for group in optimizer.param_groups)


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory; for a CPU, those of the machine, or this process's limit (ulimit -v) if that is lower."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return installed if limit == resource.RLIM_INFINITY else min(installed, limit)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ------------------------------------------------------------------------------------------------ out of memory


@contextmanager
def explain_out_of_memory(config: TrainingConfig, world: DistributedContext, trainer: Trainer | None = None) -> Generator[None]:
    """Turn an allocation failure inside into an OutOfMemoryError with sizes and hints; without a trainer, a DoesNotFitError.

    Rank 0 raises the complete message; other ranks also log their own sizes.
    """
    explained: OutOfMemoryError | None = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        explained = _explain(error, config, world, trainer)
    if explained is not None:  # only here, after the error's frames have released their memory
        if not world.is_main:
            log.error("%s", explained.summary)
            log.info("%s", explained.advice)  # to the log file: these ranks print only warnings
        raise explained


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine is out of memory, according to torch's allocators, CUDA, numpy or Python."""
    return _is_of_host(error) or isinstance(error, torch.OutOfMemoryError) or bool(_ON_GPU.search(str(error)))


def _is_of_host(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def requested_bytes(error: BaseException) -> int | None:
    """The size of the allocation that failed; None if `error` does not say."""
    match = _REQUESTED.search(str(error))
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device, as one rank sees them."""

    total: int
    peak: int
    """Peak memory of this rank."""
    in_use: int | None = None
    """Held by this rank's tensors; None on a CPU."""
    fragmented: int = 0
    """Reserved by torch's allocator but unused: fragments that are too small."""
    others: int = 0
    """Held by other processes."""

    @staticmethod
    def of(device: torch.device) -> DeviceMemory:
        """Measured now."""
        peak, total = peak_memory_bytes(device), total_memory(device)
        if device.type != "cuda":
            return DeviceMemory(total, peak)
        in_use, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        others = max(0, total - torch.cuda.mem_get_info(device)[0] - reserved)
        return DeviceMemory(total, peak, in_use, reserved - in_use, others)


def _explain(
    error: BaseException, config: TrainingConfig, world: DistributedContext, trainer: Trainer | None
) -> OutOfMemoryError:
    device = torch.device("cpu") if _is_of_host(error) else world.device
    requested, device_memory = requested_bytes(error), DeviceMemory.of(device)
    when = "before the first step" if trainer is None else f"in step {trainer.progress.step + 1}, {world.heartbeat.phase}"
    summary = f"out of memory {when}: {format_shortage(requested, device_memory, rank=world.rank, device=device)}"
    advice = [] if trainer is None else [f"  {format_state(trainer)}"]
    advice.append("most likely to help, in this order:")
    if requested is not None and device_memory.fragmented >= 2 * requested:
        advice.append(
            f"  PYTORCH_ALLOC_CONF=expandable_segments:True in the environment: {memory(device_memory.fragmented)} are free, "
            "but in pieces that are too small"
        )
    advice += [f"  {hint}" for hint in (hints if device == world.device else hints_for_host)(config, world)]
    return (DoesNotFitError if trainer is None else OutOfMemoryError)(summary, "\n".join(advice))


def format_shortage(requested: int | None, device_memory: DeviceMemory, *, rank: int, device: torch.device) -> str:
    """What was requested and what is available, as part of a sentence."""
    size = "more memory" if requested is None else f"{memory(requested)} more"
    used = [] if device_memory.in_use is None else [f"{memory(device_memory.in_use)} in use"]
    used.append(f"peak {memory(device_memory.peak)}")
    if device_memory.others > device_memory.total / 20:
        used.append(f"{memory(device_memory.others)} held by other processes")
    place = "this machine" if device.type == "cpu" else str(device)
    return f"rank {rank} requested {size} on {place}, which has {memory(device_memory.total)} ({', '.join(used)})"


def format_state(trainer: Trainer) -> str:
    """Memory that does not depend on the batch, and that of a micro-batch's logits: tokens * vocabulary * 4 bytes."""
    sizes = ", ".join(f"{name} {memory(size)}" for name, size in state_bytes(trainer).items())
    vocabulary = getattr(unwrap(trainer.model), "vocabulary_size", None)
    if not isinstance(vocabulary, int):
        return f"{sizes}; the rest grows with the micro-batch"
    sequences, length = trainer.sampler.micro_batch_size, trainer.config.data.sequence_length
    logits = memory(4 * sequences * length * vocabulary)
    return (
        f"{sizes}; the rest grows with the micro-batch, such as its logits in float32: {logits} "
        f"({sequences} x {length} tokens, vocabulary of {vocabulary})"
    )


def hints(config: TrainingConfig, world: DistributedContext) -> list[str]:
    """What reduces the memory of a run, the least intrusive first."""
    size = sequences_per_micro_batch(config.batch, world.world_size)
    copies_gradients = config.distributed.reduction == "exact" and accumulation_steps(config.batch, world.world_size) > 2
    return [
        *([f"a smaller --batch.micro_batch_size (now {size}): the curve stays the same, but for rounding"] if size > 1 else []),
        *(["--precision.dtype bf16 (now fp32): activations take about half"] if config.precision.dtype == "fp32" else []),
        *(["--distributed.reduction fast (now exact): fewer copies of the gradients, other last bits"] * copies_gradients),
        f"a smaller --data.sequence_length (now {config.data.sequence_length}) or a smaller model: "
        "this makes it another run, with its own --run_name",
    ]


def hints_for_host(config: TrainingConfig, world: DistributedContext) -> list[str]:
    """The same for a run on GPUs when the machine's own memory ran out."""
    return [
        f"fewer --data.num_workers (now {config.data.num_workers}): each is a process, on every rank",
        f"fewer ranks per machine (now {world.local_world_size}): each is a process with its own libraries",
        "more memory for the job: a save copies weights and optimizer state to the machine's memory",
    ]
