"""Which optimizer updates what."""

import pytest
import torch
from torch import nn

from dist_trainer.config.schema import OptimConfig
from dist_trainer.errors import ConfigError
from dist_trainer.optim import optimizers
from dist_trainer.optim.optimizers import build_optimizer, parameter_groups


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=True)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def test_matrices_decay_vectors_do_not_and_each_parameter_stands_once():
    model = Tied()
    decaying, others = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert [id(p) for p in decaying["params"]] == [id(model.embedding.weight)]
    assert {id(p) for p in others["params"]} == {id(model.norm.weight), id(model.norm.bias), id(model.head.bias)}


def test_adamw_takes_its_numbers_from_the_config():
    config = OptimConfig(learning_rate=0.5, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.2)
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


def test_muon_updates_hidden_matrices_and_adamw_the_rest_as_each_would_alone():
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
        for module in (model, twin):
            module.zero_grad()
            module(torch.arange(5)).square().sum().backward()
        optimizer.step()
        for each in alone:
            each.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_muon_goes_on_from_its_state():
    config = OptimConfig(name="muon", learning_rate=0.1)
    model, twin = small(), small()

    def steps(module, optimizer, count):
        for _ in range(count):
            module.zero_grad()
            module(torch.arange(5)).square().sum().backward()
            optimizer.step()

    optimizer = build_optimizer(config, model)
    steps(model, optimizer, 4)
    first, second = build_optimizer(config, twin), build_optimizer(config, twin)
    steps(twin, first, 2)
    second.load_state_dict(first.state_dict())
    steps(twin, second, 2)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_muon_is_refused_where_it_has_nothing_to_do():
    with pytest.raises(ConfigError, match=r"optim\.name: muon"):
        build_optimizer(OptimConfig(name="muon"), nn.Embedding(3, 3))


@pytest.mark.parametrize(("parameters", "fitting"), [(135_000_000, "try 2e-5 ("), (2_400_000, "try 0.0005 (")])
def test_the_default_rate_for_a_model_that_was_trained_before_is_warned_of(monkeypatch, parameters, fitting):
    said = []
    monkeypatch.setattr(optimizers.log, "warning", lambda text, *values: said.append(text % values))
    optimizers.warn_of_default_learning_rate(OptimConfig(), parameters=parameters, init_from="a/model")
    optimizers.warn_of_default_learning_rate(OptimConfig(learning_rate=2e-5), parameters=parameters, init_from="a/model")
    (line,) = said
    assert line.startswith("optim.learning_rate: 0.005 is the default, made for small models with random weights; ")
    assert fitting in line
    assert "a/model" in line
