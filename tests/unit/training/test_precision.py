import warnings

import pytest
import torch
from torch import nn

from dist_trainer.config.schema import OptimConfig, PrecisionConfig
from dist_trainer.optim.registry import build_optimizer
from dist_trainer.training.precision import Precision, build_precision, warn_of_emulated_bf16

CPU = torch.device("cpu")


OPTIMIZERS = {
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    "not fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=False),
    "muon": lambda model: build_optimizer(OptimConfig(name="muon", learning_rate=0.1), model),
}


def one_update(precision: Precision, *, loss_factor: float, optimizer: str = "fused"):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    made = OPTIMIZERS[optimizer](model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    precision.backward(model(torch.ones(1, 4)).sum() * loss_factor)
    precision.unscale(made)
    grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    precision.step(made, grad_norm)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    return grad_norm, changed, made


@pytest.fixture(params=["on the host", "as on a GPU"])
def precision_of(request, monkeypatch):
    """Makes a Precision that reads numbers at once, or one that never does."""

    def make(dtype):
        precision = Precision(dtype, CPU)
        monkeypatch.setattr(precision, "_is_on_host", request.param == "on the host")
        return precision

    return make


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_finite_gradient_updates_the_weights(dtype, optimizer, precision_of):
    grad_norm, changed, _ = one_update(precision_of(dtype), loss_factor=1.0, optimizer=optimizer)
    assert grad_norm.isfinite()
    assert all(changed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_an_infinite_loss_leaves_weights_and_optimizer_unchanged(dtype, optimizer, precision_of):
    grad_norm, changed, made = one_update(precision_of(dtype), loss_factor=float("inf"), optimizer=optimizer)
    assert not grad_norm.isfinite()
    assert not any(changed)
    for state in made.state.values():
        assert not any(value.any() for value in state.values())


def test_an_infinite_loss_with_finite_gradients_still_poisons_them(precision_of):
    weight = nn.Parameter(torch.ones(2))
    precision_of("fp32").backward(weight.sum() + torch.tensor(float("inf")))
    assert weight.grad is not None
    assert weight.grad.isnan().all()


@pytest.mark.parametrize("format", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits_wherever_the_loss_is_read(format, monkeypatch):
    found = []
    for is_on_host in (True, False):
        precision = Precision("fp32", CPU)
        monkeypatch.setattr(precision, "_is_on_host", is_on_host)
        weight = nn.Parameter(torch.linspace(-1, 1, 50))
        precision.backward((weight.sin() ** 2).sum().to(format), 1 / 777)
        found.append(weight.grad)
    assert found[0] is not None
    assert torch.equal(*found)


def test_the_fp16_scale_halves_after_an_overflow_and_comes_back_from_its_state():
    precision = Precision("fp16", CPU)
    one_update(precision, loss_factor=1.0)
    scale = precision.scaler.get_scale()
    one_update(precision, loss_factor=float("inf"))
    assert precision.scaler.get_scale() == scale / 2
    again = Precision("fp16", CPU)
    again.load_state_dict(precision.state_dict())
    assert again.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("tf32", [False, True])
def test_who_wants_no_tf32_is_not_advised_to_take_it(tf32):
    advice = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled."
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        build_precision(PrecisionConfig(tf32=tf32), torch.device("cpu"))
        warnings.warn(advice, stacklevel=1)
    assert len(heard) == tf32


def test_auto_is_fp32_on_cpu():
    assert build_precision(PrecisionConfig(), CPU).name == "fp32"


def test_autocast_computes_in_the_named_format():
    with Precision("bf16", CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    with Precision("fp32", CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


NARROW = {"architecture": "x86_64", "avx2": True, "avx512_bw": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "dtype", "warned"),
    [
        (NARROW, "bf16", True),
        (NARROW, "fp32", False),
        (NARROW | {"avx512_bw": True}, "bf16", False),
        (NARROW | {"amx_bf16": True}, "bf16", False),
        ({"architecture": "aarch64"}, "bf16", False),
        ({}, "bf16", False),
    ],
)
def test_a_cpu_that_emulates_bf16_is_reported_before_the_first_step(monkeypatch, caplog, capabilities, dtype, warned):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    warn_of_emulated_bf16(build_precision(PrecisionConfig(dtype=dtype), CPU), CPU)
    assert ("emulates, tens of times slower than fp32; --precision.dtype fp32 is faster" in caplog.text) == warned
