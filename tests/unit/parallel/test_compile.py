"""When compiling pays, and where compiled code is kept."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dist_trainer.config.schema import BatchConfig, ModelConfig, TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.loader import create_dataloaders
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError
from dist_trainer.models.decoder_lm import Attention
from dist_trainer.parallel import compile
from dist_trainer.parallel.compile import (
    BAN_RECOMPUTE,
    CACHES_AUTOGRAD_FUNCTIONS,
    WORTH_COMPILING,
    cpu_compile_switches,
    enable_compile_cache,
    number_format_in_key,
    should_compile,
)
from dist_trainer.parallel.cpu.attention import causal_attention, install_cpu_attention
from dist_trainer.training.precompile import precompile
from dist_trainer.training.trainer import Trainer

CPU, LONG, SHORT = DistributedContext.single(), 1e18, 1e12
OWN_ATTENTION = Attention(ModelConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2))
install_cpu_attention(OWN_ATTENTION)


def needs(switch: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not hasattr(compile.functorch_config, switch), reason=f"this torch has no {switch}")


@pytest.fixture
def gpu() -> DistributedContext:
    return DistributedContext(device=torch.device("cuda"))


def test_auto_compiles_long_runs_and_no_short_ones(gpu: DistributedContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "missing_compiler", lambda _: None)
    assert [should_compile("auto", CPU, flops) for flops in (LONG, WORTH_COMPILING["cpu"], SHORT, None)] == [1, 1, 0, 0]
    assert [should_compile("auto", gpu, flops) for flops in (LONG, WORTH_COMPILING["cuda"], SHORT, None)] == [1, 1, 0, 1]
    assert should_compile(True, CPU, SHORT)
    assert not should_compile(False, gpu, LONG)


@pytest.mark.parametrize("has_units", [True, False])
def test_the_units_of_a_model_are_compiled_or_the_model_itself(monkeypatch: pytest.MonkeyPatch, has_units: bool) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(module))
    monkeypatch.setattr(compile, "enable_compile_cache", lambda: None)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    if has_units:
        model.compile_units = list(model)  # type: ignore[assignment]
    compile.compile_model(model)
    assert compiled == (list(model) if has_units else [model])


@pytest.mark.parametrize(("device", "needed"), [("cpu", r"a C\+\+ compiler on a CPU"), ("cuda", "a C compiler on a GPU")])
def test_without_a_compiler_auto_continues_and_true_is_rejected(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str, needed: str
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    caplog.set_level("INFO")
    world = DistributedContext.single(device)
    assert not should_compile("auto", world, SHORT)
    assert not caplog.messages
    assert not should_compile("auto", world, LONG)
    (line,) = caplog.messages
    assert re.search(f"^running without torch.compile although the run is long: it needs {needed}", line)
    with pytest.raises(ConfigError, match=rf"precision\.compile: true needs {needed}.*; install one"):
        should_compile(True, world, SHORT)


def test_compiled_code_outlives_the_run_but_only_in_a_folder_that_nobody_else_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    monkeypatch.setenv("DIST_TRAINER_CACHE", str(tmp_path))
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(0o777)
    enable_compile_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    (tmp_path / "compiled").chmod(0o700)
    enable_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    enable_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


@needs(BAN_RECOMPUTE)
@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_code_compiled_for_a_cpu_recomputes_casts_of_weights_and_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.SiLU(), torch.nn.Linear(96, 32)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    given = torch.randn(16, 48, requires_grad=True)
    kept, gradients = [], []
    for module, context in zip(layers, (nullcontext(), cpu_compile_switches(torch.nn.Module())), strict=True):
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


@needs(BAN_RECOMPUTE)
def test_a_trainer_compiles_for_cpu_and_its_format_and_restores_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[bool, str]:
        return getattr(compile.functorch_config, BAN_RECOMPUTE), torch.compiler.config.cache_key_tag

    seen = []

    def loss_function(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(state())
        return model(batch.input_ids.float()).sum()

    monkeypatch.setattr("dist_trainer.training.precompile.is_compiled", lambda _: True)
    config, model = TrainingConfig(batch=BatchConfig(global_batch_size=2)), torch.nn.Linear(8, 1)
    rows = [(torch.arange(8), torch.arange(8))] * 4
    with torch.compiler.config.patch(cache_key_tag="mine"):
        before = state()
        trainer = Trainer(
            config,
            DistributedContext.single(),
            model=model,
            optimizer=torch.optim.SGD(model.parameters()),
            train_data=create_dataloaders(config, train_dataset=rows).train,
            loss_function=loss_function,
        )
        precompile(trainer)
        assert state() == before == (True, "mine")
    assert seen == [(False, "mine fp32")]


@needs(CACHES_AUTOGRAD_FUNCTIONS)
def test_autograd_functions_are_cached_of_models_with_attention_of_ours_alone() -> None:
    for model, cached in ((OWN_ATTENTION, True), (torch.nn.Linear(8, 1), False)):
        with cpu_compile_switches(model):
            assert getattr(compile.functorch_config, CACHES_AUTOGRAD_FUNCTIONS) is cached


def test_a_torch_without_such_switches_compiles_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "functorch_config", None)
    monkeypatch.setattr(torch.compiler, "config", object())
    with cpu_compile_switches(OWN_ATTENTION), number_format_in_key("bf16"):
        pass


@pytest.fixture
def empty_compile_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def cache_counters(function: Callable[[], Any]) -> Counter[str]:
    """How often compiled code was found in the cache, was not, or was not looked for, as in a new process."""
    torch.compiler.reset()
    counters.clear()
    function()
    return Counter({name.removeprefix("autograd_cache_"): count for name, count in counters["aot_autograd"].items()})


@needs(CACHES_AUTOGRAD_FUNCTIONS)
@pytest.mark.usefixtures("empty_compile_cache")
@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_the_next_start_finds_compiled_attention() -> None:
    def train() -> None:
        x = torch.ones(1, 1, 128, 16, dtype=torch.bfloat16, requires_grad=True)
        with cpu_compile_switches(OWN_ATTENTION):
            torch.compile(causal_attention, dynamic=False)(x, x, x).sum().backward()

    assert cache_counters(train)["miss"] == 1
    assert cache_counters(train)["hit"] == 1


@needs(CACHES_AUTOGRAD_FUNCTIONS)
@pytest.mark.usefixtures("empty_compile_cache")
@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_an_autograd_function_of_other_operations_is_not_found() -> None:
    def train(forward_factor: float, backward_factor: float) -> None:
        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                return x * forward_factor

            @staticmethod
            def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                return dy * backward_factor

        x = torch.ones(8, requires_grad=True)
        with cpu_compile_switches(OWN_ATTENTION):
            y = torch.compile(lambda x: Scaled.apply(x), dynamic=False)(x)
            y.sum().backward()
        assert (y[0].item(), x.grad[0].item()) == (forward_factor, backward_factor)

    assert cache_counters(lambda: train(1.0, 2.0))["miss"] == 1
    assert cache_counters(lambda: train(1.0, 2.0))["hit"] == 1
    assert cache_counters(lambda: train(3.0, 2.0))["miss"] == 1
    assert cache_counters(lambda: train(1.0, 3.0))["miss"] == 1


@pytest.mark.usefixtures("empty_compile_cache")
@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_what_is_compiled_for_one_number_format_is_not_taken_for_another() -> None:
    layer, x = torch.nn.Linear(64, 64), torch.randn(8, 64)

    def compute(name: str) -> None:
        with number_format_in_key(name), torch.autocast("cpu", dtype=torch.bfloat16):
            torch.compile(layer, dynamic=False)(x).sum().backward()  # only then is it kept

    assert cache_counters(lambda: compute("bf16"))["miss"] == 1
    assert cache_counters(lambda: compute("bf16"))["hit"] == 1
    assert cache_counters(lambda: compute("fp16"))["miss"] == 1  # by the name alone, as a torch that mixes them up needs it
