"""When compiling pays, and where compiled code is kept."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dist_trainer.config.schema import BatchConfig, TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.loader import create_dataloaders
from dist_trainer.distributed.world import World
from dist_trainer.errors import ConfigError
from dist_trainer.parallel import compilation
from dist_trainer.parallel.compilation import WORTH_COMPILING, is_worth_compiling, keep_compiled_code, keeping_less
from dist_trainer.trainer import Trainer

CPU, LONG, SHORT = World.single(), 1e18, 1e12


@pytest.fixture
def gpu() -> World:
    return World(device=torch.device("cuda"))


def test_auto_compiles_long_runs_and_no_short_ones(gpu: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "missing_compiler", lambda _: None)
    assert [is_worth_compiling("auto", CPU, flops) for flops in (LONG, WORTH_COMPILING["cpu"], SHORT, None)] == [1, 1, 0, 0]
    assert [is_worth_compiling("auto", gpu, flops) for flops in (LONG, WORTH_COMPILING["cuda"], SHORT, None)] == [1, 1, 0, 1]
    assert is_worth_compiling(True, CPU, SHORT)
    assert not is_worth_compiling(False, gpu, LONG)


@pytest.mark.parametrize(("device", "needed"), [("cpu", r"a C\+\+ compiler on a CPU"), ("cuda", "a C compiler on a GPU")])
def test_without_a_compiler_auto_goes_on_and_true_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str, needed: str
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    caplog.set_level("INFO")
    world = World.single(device)
    assert not is_worth_compiling("auto", world, SHORT)
    assert not caplog.messages
    assert not is_worth_compiling("auto", world, LONG)
    (line,) = caplog.messages
    assert re.search(f"precision.compile: auto needs {needed}", line)
    with pytest.raises(ConfigError, match=rf"precision\.compile: true needs {needed}.*; install one"):
        is_worth_compiling(True, world, SHORT)


def test_compiled_code_outlives_the_run_but_only_where_nobody_else_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    monkeypatch.setenv("DIST_TRAINER_CACHE", str(tmp_path))
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(0o777)
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    (tmp_path / "compiled").chmod(0o700)
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


@pytest.mark.skipif(isinstance(keeping_less(), nullcontext), reason="this torch has no such switch")
@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_what_is_compiled_keeping_less_casts_its_weights_anew_and_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.SiLU(), torch.nn.Linear(96, 32)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    given = torch.randn(16, 48, requires_grad=True)
    kept, gradients = [], []
    for module, context in zip(layers, (nullcontext(), keeping_less()), strict=True):
        saved: list[torch.Tensor] = []
        torch.compiler.reset()
        with (
            context,
            torch.autograd.graph.saved_tensors_hooks(lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda t: t),
        ):
            compiled = torch.compile(module, dynamic=False)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = compiled(given).float().square().sum()
            gradients.append(torch.autograd.grad(loss, [given, *module.parameters()]))
        kept.append({tuple(sorted(tensor.shape)) for tensor in saved if tensor.dtype is torch.bfloat16})
    assert (32, 96) in kept[0], "or it tests nothing"
    assert (32, 96) not in kept[1]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.skipif(isinstance(keeping_less(), nullcontext), reason="this torch has no such switch")
def test_a_trainer_warms_up_keeping_less_and_leaves_the_switch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def loss_function(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(compilation.partitioner.ban_recompute_materialized_backward)
        return model(batch.tokens.float()).sum()

    monkeypatch.setattr("dist_trainer.warm_up.is_compiled", lambda _: True)
    config, model = TrainingConfig(batch=BatchConfig(global_batch_size=2)), torch.nn.Linear(8, 1)
    rows = [(torch.arange(8), torch.arange(8))] * 4
    Trainer(
        config,
        World.single(),
        model=model,
        optimizer=torch.optim.SGD(model.parameters()),
        train_data=create_dataloaders(config, train_dataset=rows).train,
        loss_function=loss_function,
    ).warm_up()
    assert seen == [False]
    assert compilation.partitioner.ban_recompute_materialized_backward
