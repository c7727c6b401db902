"""Who multiplies float32 matrices while a model is trained on a CPU; told by torch's switch, and by what comes out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dist_trainer import cpu_products
from dist_trainer.config.schema import BatchConfig, TrainingConfig
from dist_trainer.cpu_products import MIN_TOKENS, fp32_products, products_by_onednn
from dist_trainer.data.loader import create_dataloaders
from dist_trainer.distributed.world import World
from dist_trainer.parallel.compilation import compile_parts
from dist_trainer.precision import Precision

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's compiler
SWITCH = torch.backends.mkldnn.matmul
LENGTH = MIN_TOKENS // 2


@pytest.fixture(autouse=True)
def torchs_own_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_products, "mkl_is_narrow_here", lambda: True)
    before = SWITCH.fp32_precision
    SWITCH.fp32_precision = "none"
    yield
    SWITCH.fp32_precision = before


def loader(*, rows_at_once: int = 2) -> DataLoader:
    config = TrainingConfig(batch=BatchConfig(global_batch_size=rows_at_once))
    rows = [(torch.arange(LENGTH), torch.arange(LENGTH)) for _ in range(rows_at_once)]
    return create_dataloaders(config, World.single(), train_dataset=rows)[0]


def compiled() -> nn.Module:
    model = nn.Linear(8, 8)
    compile_parts(model)
    return model


def choice(model: nn.Module, data: DataLoader, dtype: str = "fp32", device: str = "cpu") -> str:
    with fp32_products(model, data, LENGTH, Precision(dtype, torch.device(device))):
        return SWITCH.fp32_precision


def test_compiled_models_in_fp32_on_a_cpu_have_it():
    assert choice(compiled(), loader()) == "bf16"
    assert SWITCH.fp32_precision == "none"


def test_others_do_not(monkeypatch):
    assert choice(nn.Linear(8, 8), loader()) == "none"
    assert choice(compiled(), loader(rows_at_once=1)) == "none"  # too few tokens
    assert choice(compiled(), loader(), dtype="bf16") == "none"
    assert choice(compiled(), loader(), device="cuda") == "none"
    monkeypatch.setattr(cpu_products, "varies_in_length", lambda dataset: True)
    assert choice(compiled(), loader()) == "none"
    monkeypatch.setattr(cpu_products, "varies_in_length", lambda dataset: False)
    monkeypatch.setattr(cpu_products, "mkl_is_narrow_here", lambda: False)
    assert choice(compiled(), loader()) == "none"


def test_what_a_user_has_chosen_stands():
    SWITCH.fp32_precision = "ieee"
    assert choice(compiled(), loader()) == "ieee"
    assert SWITCH.fp32_precision == "ieee"


def test_products_are_in_float32_on_every_processor():
    left, right = (torch.randn(256, 300, dtype=torch.float64) for _ in range(2))
    with products_by_onednn():
        product = left.float() @ right.float().T
    torch.testing.assert_close(product, (left @ right.T).float(), rtol=0, atol=1e-4)  # bfloat16's errors are 0.1


def test_where_factors_would_be_rounded_torchs_own_products_are_kept(monkeypatch):
    product = torch.Tensor.__matmul__

    def rounding(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return product(left.bfloat16().float(), right) if left.dtype is torch.float32 else product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    with products_by_onednn():
        assert SWITCH.fp32_precision == "none"
