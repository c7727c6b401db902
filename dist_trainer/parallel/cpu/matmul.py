"""Products of float32 matrices on a CPU: by oneDNN where MKL, which torch takes, leaves the widest registers idle."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dist_trainer.parallel.compile import is_compiled
from dist_trainer.training.precision import Precision

MIN_TOKENS = 512
"""Of a micro-batch, from which on oneDNN is faster: a call of it costs more before it multiplies."""
LARGEST_ERROR = 1e-5
"""Of a product, as a share of its largest element: rounding to float32 leaves 1e-6, to bfloat16 2e-3."""


def matmul_context(
    model: nn.Module, precision: Precision, *, tokens: int, varying_length: bool
) -> Callable[[], AbstractContextManager[None]]:
    """Makes the contexts in which steps of `tokens` a micro-batch multiply fastest; `model` is not wrapped.

    That is oneDNN's for models of compiled blocks with rows of one length. Not compiled, attention lays its queries out so that
    oneDNN is slow with them; and oneDNN prepares anew for each shape.
    """
    is_faster = (
        precision.device_type == "cpu"
        and precision.dtype is torch.float32
        and is_compiled(model)
        and hasattr(model, "compile_units")
        and not varying_length
        and tokens >= MIN_TOKENS
        and mkl_is_narrow_here()
        and onednn_multiplies_in_fp32()
    )
    return products_by_onednn if is_faster else nullcontext


def mkl_is_narrow_here() -> bool:
    """Whether this is an AMD processor with AVX-512, of which MKL uses AVX2 alone. False where this torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    is_wide_amd = "AMD" in capabilities.get("cpu_name", "") and bool(capabilities.get("avx512_f"))
    return is_wide_amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


@contextmanager
def products_by_onednn() -> Generator[None]:
    """Within, oneDNN multiplies float32 matrices, of the whole process, unless the user has chosen before who does.

    torch hands them to oneDNN only where it allows rounding to bfloat16. Of that it makes use on processors with AMX alone;
    ask `onednn_multiplies_in_fp32` first. On GPUs products may be TF32 meanwhile.
    """
    # torch sets these attributes when it is imported, unseen by type checkers.
    backends: Any = torch.backends
    on_cpu, on_gpu = backends.mkldnn.matmul, backends.cuda.matmul
    if not _torch_chooses(on_cpu):
        yield
        return
    before_on_gpu = on_gpu.fp32_precision
    # This one switch for all, and not on_cpu's own: where the two disagree, torch.get_float32_matmul_precision raises.
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        on_cpu.fp32_precision, on_gpu.fp32_precision = "none", before_on_gpu


def onednn_multiplies_in_fp32() -> bool:
    """Whether `products_by_onednn` are in float32 on this processor; found out by one. False where it fails."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2))
    exact = left.double() @ right.double().T
    try:
        with products_by_onednn():
            product = left @ right.T
    except RuntimeError:
        return False
    return bool((product - exact).abs().max() < LARGEST_ERROR * exact.abs().max())


def _torch_chooses(on_cpu: Any) -> bool:
    try:
        return on_cpu.fp32_precision == "none" and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the user has set the one and the other
        return False
