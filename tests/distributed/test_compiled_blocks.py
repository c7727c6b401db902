"""Blocks that are compiled by themselves are the same code on any number of ranks; and what a run on a CPU gets in addition."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from dist_trainer.config.schema import DistributedConfig, ModelConfig
from dist_trainer.distributed.collectives import gather_objects
from dist_trainer.distributed.context import DistributedContext, init_distributed
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.parallel.cpu import matmul
from dist_trainer.parallel.cpu.matmul import MIN_TOKENS, onednn_matmul
from dist_trainer.parallel.registry import parallelize
from dist_trainer.run.build import build_trainer
from dist_trainer.run.resume import ResumeState
from tests.distributed.ranks import run_ranks
from tests.distributed.small_runs import small_config, write_stories

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


@pytest.mark.parametrize(("micro_batch_size", "expected"), [(4, onednn_matmul), (2, nullcontext)])
def test_a_run_multiplies_by_onednn_if_its_micro_batches_are_large_enough(micro_batch_size, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(matmul, "mkl_is_narrow_here", lambda: True)
    monkeypatch.setattr(matmul, "onednn_is_exact_here", lambda: True)
    changes = {"data__sequence_length": MIN_TOKENS // 4, "batch__micro_batch_size": micro_batch_size}
    config = small_config(write_stories(tmp_path / "text.jsonl"), tmp_path, precision__compile=True, **changes)
    trainer = build_trainer(config, DistributedContext.single(), ResumeState())
    assert trainer.step_context is expected
