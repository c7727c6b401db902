"""Which library multiplies float32 matrices on a CPU, by torch's switch and by the results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_trainer.config.schema import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    TrainConfig,
    TrainingConfig,
    ValidationConfig,
)
from dist_trainer.data.loader import create_dataloaders
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.models.loss import model_loss
from dist_trainer.optim.registry import build_optimizer
from dist_trainer.parallel.compile import compile_model
from dist_trainer.parallel.cpu import matmul
from dist_trainer.parallel.cpu.matmul import (
    MIN_TOKENS,
    matmul_context,
    mkl_is_narrow_here,
    onednn_is_exact_here,
    onednn_matmul,
)
from dist_trainer.training.precision import build_precision
from dist_trainer.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's compiler
SWITCH = torch.backends.mkldnn.matmul
ON_CPU = torch.device("cpu")
BY_ONEDNN, BY_TORCHS_CHOICE = "bf16", "none"


@pytest.fixture(autouse=True)
def on_a_wide_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "mkl_is_narrow_here", lambda: True)
    monkeypatch.setattr(matmul, "onednn_is_exact_here", lambda: True)


@pytest.fixture
def legacy_switch() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    SWITCH.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def a_model(*, compiled: bool = True) -> DecoderLM:
    shape = ModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(0)
    model = DecoderLM(shape, vocabulary_size=64, max_position_embeddings=128)
    if compiled:
        compile_model(model)
    return model


def choice(model: nn.Module, **changes: Any) -> str:
    conditions = {"device": ON_CPU, "dtype": torch.float32, "tokens": MIN_TOKENS, "varying_length": False, **changes}
    with matmul_context(model, **conditions)():
        return SWITCH.fp32_precision


def skip_where_factors_are_rounded() -> None:
    if not onednn_is_exact_here():
        pytest.skip("this processor rounds factors to bfloat16, so MKL stays")


def test_onednn_is_used_for_compiled_blocks_in_fp32_on_a_cpu():
    assert choice(a_model()) == BY_ONEDNN
    assert SWITCH.fp32_precision == BY_TORCHS_CHOICE


def test_onednn_is_not_used_if_it_is_not_faster(monkeypatch):
    model, whole = a_model(), nn.Linear(1, 1)
    compile_model(whole)
    assert choice(a_model(compiled=False)) == choice(whole) == BY_TORCHS_CHOICE
    assert choice(model, tokens=MIN_TOKENS - 1) == choice(model, varying_length=True) == BY_TORCHS_CHOICE
    assert choice(model, dtype=torch.bfloat16) == choice(model, device=torch.device("cuda")) == BY_TORCHS_CHOICE
    for condition in ("mkl_is_narrow_here", "onednn_is_exact_here"):
        with monkeypatch.context() as patch:
            patch.setattr(matmul, condition, lambda: False)
            assert choice(model) == BY_TORCHS_CHOICE


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_user_s_choice_for_all_devices_is_kept(precision, legacy_switch):
    torch.set_float32_matmul_precision(precision)
    chosen = SWITCH.fp32_precision
    with onednn_matmul():
        assert (SWITCH.fp32_precision, torch.get_float32_matmul_precision()) == (chosen, precision)
    assert (SWITCH.fp32_precision, torch.get_float32_matmul_precision()) == (chosen, precision)


def test_a_user_s_choice_for_onednn_is_kept(legacy_switch):
    SWITCH.fp32_precision = "ieee"
    with onednn_matmul():
        assert SWITCH.fp32_precision == "ieee"
    assert SWITCH.fp32_precision == "ieee"


def test_all_is_restored_even_after_an_error_and_torch_can_report_its_precision_within():
    torch.backends.cuda.matmul.allow_tf32 = False  # as build_precision does
    before = torch.backends.cuda.matmul.fp32_precision
    with onednn_matmul():
        assert torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(ZeroDivisionError), onednn_matmul():
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == "highest"
    assert (SWITCH.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == (BY_TORCHS_CHOICE, before)


def test_whether_factors_are_rounded_is_found_out(monkeypatch):
    product = Tensor.__matmul__

    def exact(left: Tensor, right: Tensor) -> Tensor:
        return product(left.double(), right.double()).to(left.dtype)

    def rounding(left: Tensor, right: Tensor) -> Tensor:
        return product(left.bfloat16().float(), right) if SWITCH.fp32_precision == BY_ONEDNN else product(left, right)

    def failing(left: Tensor, right: Tensor) -> Tensor:
        if SWITCH.fp32_precision == BY_ONEDNN:
            raise RuntimeError("could not create a primitive")
        return product(left, right)

    for multiply, expected in ((exact, True), (rounding, False), (failing, False)):
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "__matmul__", multiply)
            assert onednn_is_exact_here() is expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"cpu_name": "AMD EPYC 9654", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC 7763", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Platinum 8480+", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_which_processors_mkl_is_narrow_on(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(type(torch.backends.mkldnn), "is_available", lambda _: True)
    assert mkl_is_narrow_here() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not mkl_is_narrow_here()


def test_tf32_is_of_gpus_alone():
    build_precision(PrecisionConfig(dtype="fp32", tf32=True), torch.device("cpu"))
    assert choice(a_model()) == BY_ONEDNN


@pytest.mark.parametrize(("rows", "inner", "columns"), [(512, 256, 512), (256, 2048, 256), (64, 128, 1024)])
def test_products_are_as_exact_as_float32_is(rows, inner, columns):
    skip_where_factors_are_rounded()
    generator = torch.Generator().manual_seed(inner)
    left = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    right = torch.randn(inner, columns, generator=generator, dtype=torch.float64)
    exact = left.float().double() @ right.float().double()
    with onednn_matmul():
        product = left.float() @ right.float()
    assert (product - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_loss_and_gradients_of_a_compiled_model_agree_with_mkls_and_are_the_same_each_time():
    skip_where_factors_are_rounded()
    model, ids = a_model(), torch.randint(0, 64, (MIN_TOKENS // 128, 129), generator=torch.Generator().manual_seed(0))

    def of_a_step(context: AbstractContextManager[None]) -> list[Tensor]:
        with context:
            loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    mkls, onednns, again = (of_a_step(context) for context in (nullcontext(), onednn_matmul(), onednn_matmul()))
    torch.testing.assert_close(onednns, mkls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, onednns, rtol=0, atol=0)


def test_steps_and_the_warm_up_are_in_the_step_context_and_validation_is_not(monkeypatch, tmp_path):
    seen: dict[str, set[str]] = {"training": set(), "backward": set(), "validation": set()}

    def loss_function(model: Any, batch: Any) -> Tensor:
        loss = model_loss(model, batch)
        seen["training" if loss.requires_grad else "validation"].add(SWITCH.fp32_precision)
        if loss.requires_grad:
            loss.register_hook(lambda _: seen["backward"].add(SWITCH.fp32_precision))
        return loss

    monkeypatch.setattr("dist_trainer.training.precompile.is_compiled", lambda _: True)
    config = TrainingConfig(
        output_dir=str(tmp_path),
        data=DataConfig(sequence_length=128),
        batch=BatchConfig(global_batch_size=MIN_TOKENS // 128),
        train=TrainConfig(max_steps=2),
        validation=ValidationConfig(every_steps=1),
    )
    rows = [(torch.arange(128) % 64, torch.arange(1, 129) % 64) for _ in range(16)]
    world, model = DistributedContext.single(), a_model(compiled=False)
    loaders = create_dataloaders(config, world, train_dataset=rows, validation_dataset=rows)
    optimizer = build_optimizer(config.optim, model)
    Trainer(
        config,
        world,
        model=model,
        optimizer=optimizer,
        train_data=loaders.train,
        validation_data=loaders.validation,
        loss_function=loss_function,
        step_context=onednn_matmul,
    ).fit()
    assert seen == {"training": {BY_ONEDNN}, "backward": {BY_ONEDNN}, "validation": {BY_TORCHS_CHOICE}}
    assert SWITCH.fp32_precision == BY_TORCHS_CHOICE
