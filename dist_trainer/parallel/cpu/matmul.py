"""float32 matrix products on a CPU: by oneDNN if torch's default, MKL, does not use the widest registers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dist_trainer.parallel.compile import is_compiled

MIN_TOKENS = 512
"""Tokens of a micro-batch from which oneDNN is faster: each call of it has a larger overhead."""
LARGEST_ERROR = 1e-5
"""Error of a product, relative to its largest element: rounding to float32 causes 1e-6, to bfloat16 2e-3."""


def matmul_context(
    model: nn.Module, *, device: torch.device, dtype: torch.dtype, tokens: int, varying_length: bool
) -> Callable[[], AbstractContextManager[None]]:
    """A function that makes contexts in which forward and backward passes of `tokens` per micro-batch multiply fastest.

    `model` is not wrapped; `dtype` is the format of its products. oneDNN is used for models with compiled blocks and sequences
    of one length: without compilation attention uses a memory layout that is slow in oneDNN, and oneDNN has a start-up cost
    for each shape.
    """
    is_faster = (
        device.type == "cpu"
        and dtype is torch.float32
        and is_compiled(model)
        and hasattr(model, "compile_units")
        and not varying_length
        and tokens >= MIN_TOKENS
        and mkl_is_narrow_here()
        and onednn_is_exact_here()
    )
    return onednn_matmul if is_faster else nullcontext


def mkl_is_narrow_here() -> bool:
    """Whether this is an AMD processor with AVX-512, on which MKL uses AVX2 only. False if this torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    is_wide_amd = "AMD" in capabilities.get("cpu_name", "") and bool(capabilities.get("avx512_f"))
    return is_wide_amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


@contextmanager
def onednn_matmul() -> Generator[None]:
    """Inside, oneDNN computes the whole process's float32 matrix products, unless the user has already set torch's switches.

    torch uses oneDNN only if rounding to bfloat16 is allowed. oneDNN rounds on processors with AMX only: ask
    `onednn_is_exact_here` first. Products on GPUs may be TF32 inside.
    """
    # torch sets these attributes when it is imported; type checkers do not see them.
    backends: Any = torch.backends
    on_cpu, on_gpu = backends.mkldnn.matmul, backends.cuda.matmul
    if not _has_default_switches(on_cpu):
        yield
        return
    before_on_gpu = on_gpu.fp32_precision
    # The global switch, not on_cpu's: if the two disagree, torch.get_float32_matmul_precision raises.
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        on_cpu.fp32_precision, on_gpu.fp32_precision = "none", before_on_gpu


def onednn_is_exact_here() -> bool:
    """Whether products inside `onednn_matmul` are float32 on this processor; computes one to see. False if that fails."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2))
    exact = left.double() @ right.double().T
    try:
        with onednn_matmul():
            product = left @ right.T
    except RuntimeError:
        return False
    return bool((product - exact).abs().max() < LARGEST_ERROR * exact.abs().max())


def _has_default_switches(on_cpu: Any) -> bool:
    try:
        return on_cpu.fp32_precision == "none" and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the user has set both, and they disagree
        return False
