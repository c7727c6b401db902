"""When compiling pays, and where compiled code is kept."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dist_trainer.config.schema import BatchConfig, TrainingConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.loader import create_dataloaders
from dist_trainer.distributed.world import World
from dist_trainer.errors import ConfigError
from dist_trainer.models.cpu_attention import causal_attention
from dist_trainer.parallel import compilation
from dist_trainer.parallel.compilation import CPU_SWITCHES, WORTH_COMPILING, compiling_for_cpu, is_worth_compiling
from dist_trainer.parallel.compile_cache import keep_compiled_code, keep_number_formats_apart
from dist_trainer.trainer import Trainer

has_switches = pytest.mark.skipif(
    not all(hasattr(compilation.functorch, name) for name in CPU_SWITCHES), reason="this torch has no such switches"
)
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


@has_switches
@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_what_is_compiled_for_cpu_casts_its_weights_anew_and_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.SiLU(), torch.nn.Linear(96, 32)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    given = torch.randn(16, 48, requires_grad=True)
    kept, gradients = [], []
    for module, context in zip(layers, (nullcontext(), compiling_for_cpu()), strict=True):
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


@has_switches
def test_a_trainer_warms_up_compiling_for_cpu_and_leaves_the_switches_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def loss_function(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        seen.append({name: getattr(compilation.functorch, name) for name in CPU_SWITCHES})
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
    assert seen == [CPU_SWITCHES]
    assert all(getattr(compilation.functorch, name) is not value for name, value in CPU_SWITCHES.items())


@pytest.fixture
def no_cache_key_tag() -> Iterator[None]:
    with torch.compiler.config.patch(cache_key_tag=""):
        yield


@pytest.fixture
def empty_compile_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cache_key_tag: None) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def compiled_anew(function: Callable[[], Any]) -> Counter[str]:
    """How often compiled code was found in the cache, was not, or was not looked for, as in a process of its own."""
    torch.compiler.reset()
    counters.clear()
    function()
    return Counter({name.removeprefix("autograd_cache_"): count for name, count in counters["aot_autograd"].items()})


@has_switches
@pytest.mark.usefixtures("empty_compile_cache")
@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_the_next_start_finds_compiled_attention_though_it_is_an_autograd_function() -> None:
    def train(scale: float) -> float:
        def attention(x: torch.Tensor) -> torch.Tensor:
            return causal_attention(*(x * scale for _ in range(3)))

        x = torch.ones(1, 1, 128, 16, dtype=torch.bfloat16, requires_grad=True)
        with compiling_for_cpu():
            y = torch.compile(attention, dynamic=False)(x).sum()
            y.backward()
        return y.item()

    assert compiled_anew(lambda: train(2.0))["miss"] == 1
    assert compiled_anew(lambda: train(2.0))["hit"] == 1
    assert compiled_anew(lambda: train(3.0))["miss"] == 1


@pytest.mark.usefixtures("empty_compile_cache")
@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_what_is_compiled_for_one_number_format_is_not_taken_for_another() -> None:
    layer, x = torch.nn.Linear(64, 64), torch.randn(8, 64)

    def compute(name: str, dtype: torch.dtype) -> None:
        keep_number_formats_apart(name)
        with torch.autocast("cpu", dtype=dtype):
            y = torch.compile(layer, dynamic=False)(x)
            assert torch.equal(y, layer(x)), name
        y.sum().backward()  # only then is it kept

    assert compiled_anew(lambda: compute("bf16", torch.bfloat16))["miss"] == 1
    assert compiled_anew(lambda: compute("fp16", torch.float16))["miss"] == 1
    assert compiled_anew(lambda: compute("bf16", torch.bfloat16))["hit"] == 1
    assert compiled_anew(lambda: compute("mine", torch.bfloat16))["miss"] == 1  # apart by the name alone


@pytest.mark.usefixtures("no_cache_key_tag")
def test_a_cache_key_tag_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_CACHE_KEY_TAG", "ours")
    for name in ("bf16", "fp16"):
        keep_number_formats_apart(name)
        assert torch.compiler.config.cache_key_tag == f"ours {name}"
