"""Number formats: autocast for the forward pass, and a GradScaler on each rank for fp16."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_trainer.config.schema import PrecisionConfig
from dist_trainer.training.nonfinite import nan_unless_finite, step_if_finite

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The forward pass in `dtype` over float32 weights; fp16 gradients are scaled so that they do not underflow."""

    def __init__(self, dtype: Literal["fp32", "bf16", "fp16"], device: torch.device) -> None:
        self.name = dtype
        self.dtype = DTYPES[dtype]
        self.device_type = device.type
        self._is_on_host = device.type == "cpu"  # reading a number needs no synchronisation
        # If disabled, every method of the scaler is the identity.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.dtype is not torch.float32:
            return torch.autocast(self.device_type, dtype=self.dtype)
        if torch.is_autocast_enabled(self.device_type):
            return torch.autocast(self.device_type, enabled=False)  # turns off a caller's
        return nullcontext()

    def backward(self, loss: Tensor, factor: float = 1.0) -> None:
        """Gradients of `loss` * `factor`, all NaN if the loss is not finite."""
        weight = nan_unless_finite(loss, factor, on_host=self._is_on_host)
        # Not passed to `backward` as a gradient: torch would import sympy, which adds two seconds to the first step.
        self.scaler.scale(loss.float() * weight).backward()

    def unscale(self, optimizer: Optimizer) -> None:
        """Undo the scaling of the gradients."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, grad_norm: Tensor) -> None:
        """Update the weights, unless the gradients are not finite: then they and the optimizer's state stay unchanged."""
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            step_if_finite(optimizer, grad_norm, on_host=self._is_on_host)

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state (empty but for fp16); plain numbers."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; a run that was not fp16 before starts with a new scaler."""
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict(state)


def build_precision(config: PrecisionConfig, device: torch.device) -> Precision:
    """What `config.dtype` means on `device`: auto is bf16 if the GPU has it, else fp16 on GPUs, fp32 on CPU.

    Sets whether fp32 matrix products of this process may be TF32 on GPUs.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32 and device.type == "cuda"
    if not config.tf32:  # the user's choice; torch's compiler would warn about it on every rank
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores for float32")
    if config.dtype != "auto":
        return Precision(config.dtype, device)
    if device.type != "cuda":
        return Precision("fp32", device)
    return Precision("fp16" if emulates_bf16(device) else "bf16", device)


def emulates_bf16(device: torch.device) -> bool:
    """Whether `device` has no instructions for bf16 and converts each number to float32 and back: GPUs before Ampere, x86
    CPUs with neither AVX-512 nor AMX. False if this torch cannot tell.
    """
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    is_known = capabilities.get("architecture") == "x86_64"
    return is_known and not (capabilities.get("avx512_bw") or capabilities.get("amx_bf16"))


def warn_of_emulated_bf16(precision: Precision, device: torch.device) -> None:
    """Warn before the first step: on a CPU, the run would take tens of times as long as in fp32."""
    if precision.dtype is torch.bfloat16 and emulates_bf16(device):
        slower, better = ("tens of times slower than fp32", "fp32") if device.type == "cpu" else ("slowly", "fp16")
        log.warning(
            "precision.dtype: bf16, which this %s has no instructions for and emulates, %s; --precision.dtype %s is faster",
            *("CPU" if device.type == "cpu" else "GPU", slower, better),
        )
