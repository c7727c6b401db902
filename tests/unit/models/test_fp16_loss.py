"""In float16 the loss in chunks is at least as exact as plain AMP, for words of any frequency."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fp16_loss import errors, in_chunks, plain_amp, problem_of, unscaled
from dist_trainer.models import loss
from dist_trainer.models.loss import LogitLoss, linear_cross_entropy_sum


def test_rows_of_rare_tokens_are_as_exact_as_under_plain_amp():
    problem = problem_of(50257, hidden_size=8, tokens=64, device="cpu")
    usual, ours, without_scale = (errors(function, problem, scale=65536.0) for function in (plain_amp, in_chunks, unscaled))
    assert all(ours[what] < 1.05 * usual[what] for what in usual)
    rare = "words 10001 to 50257"
    assert without_scale[rare] > 10 * usual[rare], "the problem has words rare enough to need a scale"


def losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, dtype: torch.dtype) -> list[torch.Tensor]:
    """The loss, and its gradients by `hidden` and `weight`."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        total = linear_cross_entropy_sum(hidden, weight, targets, logit_loss=LogitLoss(), chunk_tokens=16)
    return [total.detach(), *torch.autograd.grad(total, (hidden, weight))]


def test_sums_that_leave_float16_are_finite_and_right():
    generator = torch.Generator().manual_seed(0)
    hidden = 300 + torch.randn(300, 8, generator=generator)
    weight = torch.randn(40, 8, generator=generator) / 300
    weight[7] -= 0.01
    targets = torch.full((300,), 7)
    found, exact = (losses(hidden, weight, targets, dtype=dtype) for dtype in (torch.float16, torch.float32))
    assert float(exact[2].abs().max()) > 65504
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=0.02, atol=0.02 * float(true.abs().max()))


def test_tokens_that_are_not_counted_have_no_gradient():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=generator) for rows in (50, 40))
    targets = torch.randint(0, 40, (50,), generator=generator)
    targets[::3] = loss.IGNORED_TARGET
    _, of_hidden, of_weight = losses(hidden, weight, targets, dtype=torch.float16)
    assert not of_hidden[::3].any()
    assert of_hidden[1::3].all()
    counted = targets != loss.IGNORED_TARGET
    torch.testing.assert_close(of_weight, losses(hidden[counted], weight, targets[counted], dtype=torch.float16)[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_compiler_is_given_is_scaled_alike(dtype):
    logits = torch.randn(40, 61, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(40)
    eager, compiled = LogitLoss()(logits, targets), torch.compile(LogitLoss(), backend="eager", fullgraph=True)(logits, targets)
    torch.testing.assert_close(compiled, eager)
    assert (eager[1].abs().max() > 1) == (dtype == torch.float16)


def test_a_model_that_is_in_float16_itself_gets_its_gradients_in_float16():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=generator).half().requires_grad_() for rows in (32, 40))
    total = linear_cross_entropy_sum(hidden, weight, torch.arange(32), logit_loss=LogitLoss(), chunk_tokens=16)
    total.backward()
    expected = losses(hidden.detach().float(), weight.detach().float(), torch.arange(32), dtype=torch.float32)
    for found, true in zip((hidden.grad, weight.grad), expected[1:], strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), true, rtol=5e-3, atol=5e-3 * float(true.abs().max()))


def test_on_a_gpu_products_of_float16_are_rounded_to_float32():
    with FakeTensorMode():
        gradient = torch.empty(4096, 50257, dtype=torch.float16, device="cuda")
        weight = torch.empty(50257, 64, dtype=torch.float16, device="cuda")
        product = loss._product(gradient, weight)
    assert (product.dtype, product.device.type, product.shape) == (torch.float32, "cuda", (4096, 64))
