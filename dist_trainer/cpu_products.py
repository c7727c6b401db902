"""Products of float32 matrices on a CPU: by oneDNN where MKL leaves the processor's widest registers idle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dist_trainer.data.rows import varies_in_length
from dist_trainer.data.sampler import GlobalOrderSampler
from dist_trainer.parallel.compilation import is_compiled
from dist_trainer.precision import Precision

MIN_TOKENS = 512
"""Of a micro-batch, from which on oneDNN is faster: a call of it costs more before it multiplies."""


def fp32_products(
    model: nn.Module, train_data: DataLoader[object], sequence_length: int, precision: Precision
) -> AbstractContextManager[None]:
    """The context to train `model` in, which is not wrapped: products by oneDNN where that is faster, else as torch has it.

    For compiled models: else torch's attention has its queries in an order of memory that oneDNN is slow with. And for rows all
    of one length: oneDNN prepares itself for every shape.
    """
    sampler = train_data.sampler
    takes_onednn = (
        precision.device_type == "cpu"
        and precision.dtype is torch.float32
        and is_compiled(model)
        and not varies_in_length(train_data.dataset)
        and isinstance(sampler, GlobalOrderSampler)
        and sampler.micro_batch_size * sequence_length >= MIN_TOKENS
        and mkl_is_narrow_here()
    )
    return products_by_onednn() if takes_onednn else nullcontext()


def mkl_is_narrow_here() -> bool:
    """Whether this is an AMD processor with AVX-512, of which MKL uses AVX2 alone. False where this torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        torch.backends.mkl.is_available() and "AMD" in capabilities.get("cpu_name", "") and bool(capabilities.get("avx512_f"))
    )


@contextmanager
def products_by_onednn() -> Iterator[None]:
    """Within, oneDNN multiplies float32 matrices, if it does so in float32, and if the user has not chosen otherwise.

    torch takes it only where it may round factors to bfloat16, which a processor without AMX has no use for: that is tried.
    """
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # which torch makes when it is imported
    before = products.fp32_precision
    if before == "none":
        products.fp32_precision = "bf16"
        if not _multiplies_in_fp32():
            products.fp32_precision = before
    try:
        yield
    finally:
        products.fp32_precision = before


def _multiplies_in_fp32() -> bool:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    # float32's rounding leaves 1e-6 of the largest, bfloat16's 2e-3.
    return bool((left @ right - exact).abs().max() < 1e-5 * exact.abs().max())
