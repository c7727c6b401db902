"""Copies of a state in host memory; copies from a GPU go into pinned memory that is allocated once and reused."""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_ALIGNMENT = 64
"""Alignment in bytes; no dtype needs more."""


class PinnedMemory:
    """Host memory for the GPU tensors of one snapshot at a time: of exactly their size, pinned once.

    Pinning is as slow as copying. torch allocates pinned memory per tensor, rounds it up to powers of two, and never frees it
    (pytorch/pytorch#150517), so it could take twice the size of the state for each snapshot in memory.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._unpin = weakref.finalize(self, lambda: None)
        self._borrower: weakref.ref[object] | None = None

    def take(self, num_bytes: int) -> mmap.mmap | None:
        """Memory of at least this size; None while a snapshot that uses it is still being written."""
        if self._borrower is not None and self._borrower() is not None:
            return None
        if self._memory is None or len(self._memory) < num_bytes:
            self._unpin()
            self._memory = mmap.mmap(-1, num_bytes)  # shared memory, so that forking this process does not move its pages
            if pin(self._memory):
                self._unpin = weakref.finalize(self, unpin, self._memory)
                self._unpin.atexit = False  # at exit the system frees it, and CUDA may be gone
        return self._memory

    def lend_to(self, snapshot: object) -> None:
        """Mark the memory taken last as in use for as long as `snapshot` exists."""
        self._borrower = weakref.ref(snapshot)


@dataclass(frozen=True, eq=False)
class HostCopy:
    """Copies that may still be under way. Their pinned memory is in use for as long as this object exists."""

    tensors: dict[str, Tensor]
    done: torch.cuda.Event | None
    """None: they were made at once."""

    def wait(self) -> dict[str, Tensor]:
        """The copies, when they are complete. For another thread than the one that trains."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensors


def start_host_copy(tensors: Mapping[str, Tensor], *, pinned: PinnedMemory) -> HostCopy:
    """Copies of `tensors` as they are now; this thread does not wait for a GPU.

    The copies from a GPU are queued behind the step, on the same stream, so what follows does not change what they read: it
    is delayed by as long as they take, which is the size of `tensors` over the speed of the bus.
    """
    taken, uses_pinned, is_under_way = _start_copies(tensors, copies=True, pinned=pinned)
    copy = HostCopy(taken, copies_done() if is_under_way else None)
    if uses_pinned:
        pinned.lend_to(copy)
    return copy


def to_host(tensors: Mapping[str, Tensor], *, copies: bool, pinned: PinnedMemory | None) -> tuple[dict[str, Tensor], bool]:
    """`tensors` in host memory, contiguous, each in its own storage; and whether they are in `pinned`.

    Without `copies`, tensors in host memory are not copied, if possible. Copies from a GPU run concurrently and are awaited
    once; nothing reads or copies them before that.
    """
    taken, uses_pinned, is_under_way = _start_copies(tensors, copies=copies, pinned=pinned)
    if is_under_way:
        await_copies()
    return taken, uses_pinned


def _start_copies(
    tensors: Mapping[str, Tensor], *, copies: bool, pinned: PinnedMemory | None
) -> tuple[dict[str, Tensor], bool, bool]:
    """What `to_host` returns, and whether copies from a GPU are still under way."""
    taken: dict[str, Tensor] = {}
    on_gpu: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        # Files contain complete tensors: a view of another tensor, or a second name for the same one, needs its own memory.
        is_apart = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in storages
        storages.add(storage.data_ptr())
        if is_on_gpu(tensor):
            on_gpu[name] = tensor.detach()
        elif not copies and is_apart and tensor.is_contiguous():
            taken[name] = tensor.detach()
        else:
            taken[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    memory = None if pinned is None or not on_gpu else pinned.take(_bytes_of(on_gpu))
    offset = 0
    for name, tensor in on_gpu.items():
        taken[name] = _empty_like(tensor, memory, offset)
        offset += _aligned(tensor)
        start_copy(taken[name], tensor)
    return {name: taken[name] for name in tensors}, memory is not None, bool(on_gpu)


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether `tensor` is in a GPU's memory."""
    return tensor.is_cuda


def start_copy(to: Tensor, tensor: Tensor) -> None:
    """Start to copy a GPU's `tensor` into host memory; the copy is complete after `await_copies`."""
    to.copy_(tensor, non_blocking=True)


def await_copies() -> None:
    """Wait for all copies from the GPU."""
    torch.cuda.synchronize()


def copies_done() -> torch.cuda.Event:
    """An event that comes when the copies started so far are complete. Who waits for it sleeps."""
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


def pin(memory: mmap.mmap) -> bool:
    """Pin `memory`, so that a GPU can write to it directly; returns whether that worked. If not, copies are slower."""
    register = _cuda_runtime("cudaHostRegister")
    code = None if register is None else int(register(_address(memory), len(memory), 0))
    if code == 0:
        return True
    log.warning("%.1f GiB of host memory could not be pinned (CUDA error %s); saving is slower", len(memory) / 2**30, code)
    if code is not None:
        with contextlib.suppress(RuntimeError):  # CUDA reports the error again at the next kernel: launch one that does nothing
            torch.zeros((), device="cuda")
    return False


def unpin(memory: mmap.mmap) -> None:
    """Undo `pin`."""
    unregister = _cuda_runtime("cudaHostUnregister")
    if unregister is not None:
        unregister(_address(memory))


def _cuda_runtime(function: str) -> Callable[..., Any] | None:
    """A function of CUDA's runtime, which returns an error code; None if this torch has none of that name."""
    return getattr(torch.cuda.cudart(), function, None) if torch.cuda.is_available() else None


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def _empty_like(tensor: Tensor, memory: mmap.mmap | None, offset: int) -> Tensor:
    """An empty contiguous tensor of the same shape and dtype: in `memory` from byte `offset` on, or in its own memory."""
    if memory is None or tensor.nbytes == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=offset)
    return raw.view(tensor.dtype).view(tensor.shape)


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return max(1, sum(map(_aligned, tensors.values())))
