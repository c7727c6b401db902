"""Which optimizer updates what."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.optim import Optimizer

from dist_trainer.config.schema import ModelConfig, OptimConfig
from dist_trainer.errors import ConfigError
from dist_trainer.optim import muon
from dist_trainer.optim.muon import hidden_matrices, newton_schulz
from dist_trainer.optim.registry import (
    build_optimizer,
    init_optimizer_state,
    parameter_groups,
    resolve_optimizer_name,
)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=True)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def test_matrices_decay_vectors_do_not_and_each_parameter_is_in_one_group():
    model = Tied()
    decaying, others = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert [id(p) for p in decaying["params"]] == [id(model.embedding.weight)]
    assert {id(p) for p in others["params"]} == {id(model.norm.weight), id(model.norm.bias), id(model.head.bias)}


def test_adamw_takes_its_numbers_from_the_config():
    config = OptimConfig(name="adamw", learning_rate=0.5, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.2)
    optimizer = build_optimizer(config, Tied())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.7)
    assert optimizer.param_groups[0]["eps"] == 1e-3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.up = nn.Linear(4, 8)
        self.lm_head = nn.Linear(8, 5, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.up(self.embed_tokens(tokens)).tanh())


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def a_step_of(module: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    module.zero_grad()
    module(torch.arange(5)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.fixture
def torch_s_in_float32(monkeypatch):
    """torch.optim.Muon rounds to bfloat16, by either of these names."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    monkeypatch.setattr(torch, "bfloat16", torch.float32)


def test_muon_updates_hidden_matrices_and_adamw_the_rest_as_torch_does_each(torch_s_in_float32):
    config = OptimConfig(name="muon", learning_rate=0.1)
    model, twin = small(), small()
    optimizer = build_optimizer(config, model)
    alone = [
        torch.optim.Muon([twin.up.weight], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [twin.embed_tokens.weight, twin.lm_head.weight]},
                {"params": [twin.up.bias], "weight_decay": 0.0},
            ],
            lr=0.1,
            betas=config.betas,
            weight_decay=0.1,
            fused=True,
        ),
    ]
    for rate in (0.1, 0.05, 0.02):
        for each in (optimizer, *alone):
            for group in each.param_groups:
                group["lr"] = rate
        a_step_of(model, optimizer)
        a_step_of(twin, *alone)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 6, 20), (2, 20, 6), (1, 7, 7)])
def test_matrices_that_are_orthogonalized_together_are_what_torch_makes_of_each_in_float32(shape, torch_s_in_float32):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mine = newton_schulz(matrices, coefficients=(3.4445, -4.775, 2.0315), steps=5, eps=1e-7)
    parameters = [nn.Parameter(torch.zeros(shape[1:])) for _ in range(shape[0])]
    theirs = torch.optim.Muon(parameters, lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw")
    for parameter, matrix in zip(parameters, matrices, strict=True):
        parameter.grad = matrix.clone()
    theirs.step()
    size = 0.2 * max(shape[1:]) ** 0.5
    for parameter, direction in zip(parameters, mine, strict=True):
        torch.testing.assert_close(parameter.detach(), -size * direction, rtol=1e-5, atol=1e-6)


def test_singular_values_come_near_1():
    matrix = torch.randn(1, 8, 30, generator=torch.Generator().manual_seed(0)) * 1e3
    direction = newton_schulz(matrix, coefficients=(3.4445, -4.775, 2.0315), steps=5, eps=1e-7)
    values = torch.linalg.svdvals(direction[0])
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_matrices_in_parts_are_updated_as_all_at_once(monkeypatch):
    def after_two_steps():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 4), *(nn.Linear(4, 4) for _ in range(5)), nn.Linear(4, 2))
        optimizer = build_optimizer(OptimConfig(name="muon", learning_rate=0.1), model)
        a_step_of(model, optimizer)
        a_step_of(model, optimizer)
        return list(model.parameters())

    together = after_two_steps()
    monkeypatch.setattr(muon, "MATRICES_AT_ONCE", 2)
    for mine, theirs in zip(after_two_steps(), together, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_skipped_update_of_muon_changes_neither_parameters_nor_state():
    model = small()
    optimizer = build_optimizer(OptimConfig(name="muon", learning_rate=0.1), model)
    a_step_of(model, optimizer)
    before = [value.clone() for value in (*model.parameters(), *tensors_of(optimizer))]
    a_step_of(model)  # gradients, no update
    for parameter in model.parameters():
        parameter.grad[..., 0] = torch.nan
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = (*model.parameters(), *tensors_of(optimizer))
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    optimizer.found_inf = torch.zeros(())
    a_step_of(model, optimizer)
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=False))


def tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def test_muon_continues_from_its_state():
    config = OptimConfig(name="muon", learning_rate=0.1)
    model, twin = small(), small()
    optimizer = build_optimizer(config, model)
    for _ in range(4):
        a_step_of(model, optimizer)
    first, second = build_optimizer(config, twin), build_optimizer(config, twin)
    a_step_of(twin, first)
    a_step_of(twin, first)
    second.load_state_dict(first.state_dict())
    a_step_of(twin, second)
    a_step_of(twin, second)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_auto_is_muon_for_a_decoder_lm_from_scratch_with_large_steps_and_adamw_otherwise():
    def name(**model) -> str:
        return resolve_optimizer_name(OptimConfig(), ModelConfig(**model), tokens_per_step=16 * 256).name

    assert name() == name(hidden_size=256) == "muon"
    assert name(hidden_size=258) == "adamw"
    assert name(init_from="a/run") == name(name="hf", init_from="a/model") == name(name="package:function") == "adamw"
    chosen = OptimConfig(name="muon", learning_rate=0.5)
    assert resolve_optimizer_name(chosen, ModelConfig(init_from="a/run"), tokens_per_step=1) == chosen
    assert isinstance(build_optimizer(OptimConfig(), small()), torch.optim.AdamW), "in Python, where nobody says what it is"


def test_a_model_of_hidden_matrices_alone_is_muons():
    model = nn.Linear(3, 4, bias=False)
    optimizer = build_optimizer(OptimConfig(name="muon"), model)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.weight)


def names_of_hidden_matrices(kind: str, **shape) -> set[str]:
    config = getattr(transformers, f"{kind}Config")(**shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    inside, outside = hidden_matrices(model)
    assert len({id(parameter) for parameter in inside + outside}) == len(list(model.parameters()))
    chosen = {id(parameter) for parameter in inside}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def test_hidden_matrices_of_transformers_models_are_what_multiplies_hidden_states():
    llama = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    found = names_of_hidden_matrices("Llama", **llama)
    assert {name.split(".")[-2] for name in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    found = names_of_hidden_matrices("GPT2", n_embd=8, n_head=2, n_layer=1, vocab_size=9)
    assert {name.partition(".h.0.")[2] for name in found} == {
        *("attn.c_attn.weight", "attn.c_proj.weight"),
        *("mlp.c_fc.weight", "mlp.c_proj.weight"),
    }
    bert = {"is_decoder": True, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    found = names_of_hidden_matrices("Bert", **bert, vocab_size=9)
    assert any(name.endswith("attention.output.dense.weight") for name in found)
    assert not any("decoder" in name or "embeddings" in name for name in found)
    found = names_of_hidden_matrices(
        "BioGpt", tie_word_embeddings=False, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9
    )
    assert not any(name.startswith("output_projection") for name in found)
    found = names_of_hidden_matrices("Mamba", hidden_size=8, state_size=4, num_hidden_layers=1, vocab_size=9)
    assert found
    assert not any(name.endswith("A_log") for name in found)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_averages_made_ahead_are_those_of_the_first_step_and_none_is_made_twice(name):
    results = []
    for ahead in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 7))
        optimizer = build_optimizer(OptimConfig(name=name), model)
        if ahead:
            init_optimizer_state(optimizer)
        for _ in range(2):
            model(torch.arange(7)).square().sum().backward()
            optimizer.step()
            if ahead:
                init_optimizer_state(optimizer)
        results.append((list(model.parameters()), [optimizer.state[parameter] for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_averages_of_a_parameter_without_gradients_are_saved_and_loaded_as_zeros(name):
    def with_an_unused_layer() -> nn.ModuleList:
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def step(model: nn.ModuleList, optimizer: Optimizer) -> None:
        model[0](torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, resumed = with_an_unused_layer(), with_an_unused_layer()
    optimizer, fresh = (build_optimizer(OptimConfig(name=name), either) for either in (model, resumed))
    init_optimizer_state(optimizer)
    step(model, optimizer)
    resumed.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both would have the same tensors
    for _ in range(2):
        step(model, optimizer)
        step(resumed, fresh)
    torch.testing.assert_close(list(model.parameters()), list(resumed.parameters()), atol=0, rtol=0)
    of_unused = [value for parameter in resumed[1].parameters() for value in fresh.state[parameter].values()]
    assert of_unused
    assert not any(value.any() for value in of_unused)


def test_muon_is_rejected_if_it_has_nothing_to_do():
    with pytest.raises(ConfigError, match=r"optim\.name: muon"):
        build_optimizer(OptimConfig(name="muon"), nn.Embedding(3, 3))
