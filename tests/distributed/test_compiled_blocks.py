"""Blocks that are compiled each for itself are the same code on any number of ranks."""

import pytest
import torch
from torch import nn

from dist_trainer.config.schema import DistributedConfig, ModelConfig
from dist_trainer.distributed.collectives import gather_objects
from dist_trainer.distributed.context import init_distributed
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.parallel.registry import parallelize
from tests.distributed.ranks import run_ranks

# 4 MiB a block: torch's compiler cuts a data-parallel model after each bucket, of which the first has 1 MiB.
CONFIG = ModelConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)


def operations_of_each_graph(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """By rank, how many operations each graph has that the compiler is given for a step of a DecoderLM."""
    graphs = []

    def compile_counted(module: nn.Module, **options: object) -> None:
        backend = lambda graph, inputs: graphs.append(len(graph.graph.nodes)) or graph.forward  # noqa: E731
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, **options)

    monkeypatch.setattr(nn.Module, "compile", compile_counted)

    def on_each_rank() -> list[list[int]]:
        with init_distributed(DistributedConfig(hang_timeout_minutes=1)) as world:
            model = DecoderLM(CONFIG, 64, 32)
            model.init_weights(0)
            wrapped = parallelize(model, world, compile=True)
            tokens = torch.arange(32)[None]
            wrapped(tokens, tokens).backward()
            return gather_objects(graphs, world)

    return on_each_rank


@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_a_block_is_one_graph_on_one_rank_and_on_two(monkeypatch):
    on_each_rank = operations_of_each_graph(monkeypatch)
    [[alone]] = run_ranks(1, on_each_rank)
    for by_rank in run_ranks(2, on_each_rank):
        assert by_rank == [alone, alone]
