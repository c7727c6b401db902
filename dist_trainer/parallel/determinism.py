"""Kernels that give the same bits each time they run, on GPUs."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

from dist_trainer.errors import ConfigError

_WITHOUT = "does not have a deterministic implementation"


def use_deterministic_kernels() -> None:
    """For this process: torch raises RuntimeError in operations that have no deterministic kernel on a GPU.

    Call it before the first matrix product: cuBLAS reads its variable once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Otherwise torch would fill all memory that it allocates, which only helps against other faults.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def operations_without_deterministic_kernels_named() -> Generator[None]:
    """Raises ConfigError with the name of such an operation, instead of torch's RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        name, found, _ = str(error).partition(_WITHOUT)
        if not found:
            raise
        raise ConfigError(
            f"distributed.reduction: exact, but {name.strip()} has no deterministic kernel on this GPU; replace this operation "
            "in the model, or set --distributed.reduction fast"
        ) from error
