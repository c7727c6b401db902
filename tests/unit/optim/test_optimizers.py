import torch
from torch import nn

from dist_trainer.config.schema import OptimConfig
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
