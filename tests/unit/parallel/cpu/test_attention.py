"""Attention by products is torch's attention: in value, in gradients, and in what its rounding costs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_trainer.config.schema import ModelConfig
from dist_trainer.models.attention import attention, rotary_tables
from dist_trainer.models.decoder_lm import Block
from dist_trainer.parallel.compile import compile_model
from dist_trainer.parallel.cpu.attention import LENGTHS, causal_attention, has_cpu_attention, install_cpu_attention

ORIGINALS = torch.zeros(())
CONFIG = ModelConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def inputs(length: int, dtype: torch.dtype, *, groups: int = 4, size: int = 16, sharpness: float = 1.0) -> list[Tensor]:
    """q, k, v and the gradient of the output, [2, 4 heads, length, size] as projections lay them out."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, number, size) for number in (4, groups, groups, 4)]
    made = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    made[0] *= sharpness
    # Values with much in common: their differences are what the scores' gradients are made of.
    made[2] += 4
    return [x.to(dtype) for x in made]


def value_and_gradients(attention: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    *operands, dy = [x.clone().requires_grad_() for x in given]
    y = attention(*operands)
    return [y.detach(), *torch.autograd.grad(y, operands, dy)]


# Heads of 64 keep their weights for the backward pass up to 512 tokens, heads of 16 up to 128.
@pytest.mark.parametrize(("length", "size"), [(1, 16), (100, 16), (128, 16), (129, 16), (300, 16), (1100, 16), (300, 64)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_in_float32_value_and_gradients_are_torchs(length, size, groups):
    given = inputs(length, torch.float32, groups=groups, size=size)
    for own, expected in zip(value_and_gradients(causal_attention, given), value_and_gradients(torchs, given), strict=True):
        assert own.shape == expected.shape
        torch.testing.assert_close(own, expected, atol=2e-5, rtol=2e-5)


def errors(attention: Callable[..., Tensor], given: list[Tensor]) -> list[float]:
    """Relative, of the value and of the gradients of q, k and v, against float64."""
    exact = value_and_gradients(torchs, [x.double() for x in given])
    found = value_and_gradients(attention, given)
    return [float((own.double() - true).norm() / true.norm()) for own, true in zip(found, exact, strict=True)]


@pytest.mark.parametrize("sharpness", [1.0, 8.0])
@pytest.mark.parametrize(("length", "groups", "size"), [(128, 4, 16), (256, 4, 16), (300, 2, 16), (256, 4, 64), (512, 2, 64)])
def test_in_bfloat16_it_is_as_exact_as_torchs_own(length, groups, size, sharpness):
    given = inputs(length, torch.bfloat16, groups=groups, size=size, sharpness=sharpness)
    for own, torchs_own in zip(errors(causal_attention, given), errors(torchs, given), strict=True):
        assert own < 1.3 * torchs_own


@pytest.mark.parametrize(("length", "keeps"), [(128, True), (129, False)])
def test_only_weights_of_short_sequences_are_kept_for_the_backward_pass_and_in_the_inputs_format(length, keeps):
    q, k, v, _ = (x.requires_grad_() for x in inputs(length, torch.bfloat16))
    y = causal_attention(q, k, v)
    kept = [x for x in y.grad_fn.next_functions[0][0].saved_tensors if x.shape[-1] == length]
    assert [x.dtype for x in kept] == [torch.bfloat16] * keeps


def graph_of(block: Block, x: Tensor, *, with_gradients: bool) -> str:
    """The operations that a compiler is given for `block` in bfloat16 autocast."""
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(with_gradients):
        compiled(x, *rotary_tables(CONFIG, x.shape[1], x.device))
    return str(graphs[0].graph)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it
def test_it_is_used_when_a_block_is_compiled_for_training_on_sequences_of_one_length():
    block = Block(CONFIG, 0)
    long, short = torch.randn(2, LENGTHS.start, 64), torch.randn(2, LENGTHS.start - 1, 64)
    assert "scaled_dot_product_attention" in graph_of(block, long, with_gradients=True)
    install_cpu_attention(block)
    assert "scaled_dot_product_attention" not in graph_of(block, long, with_gradients=True)
    assert "scaled_dot_product_attention" in graph_of(block, long, with_gradients=False)
    assert "scaled_dot_product_attention" in graph_of(block, short, with_gradients=True)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's compiler
def test_only_models_that_are_compiled_for_sequences_of_one_length_have_it_and_all_layers_the_same_one():
    blocks = nn.ModuleList([Block(CONFIG, 0), Block(CONFIG, 1)])
    assert not has_cpu_attention(blocks)
    compile_model(blocks, varying_length=True)
    assert not has_cpu_attention(blocks)
    for _ in range(2):  # the second time nothing is left to replace
        compile_model(blocks)
        assert has_cpu_attention(blocks)
        functions = {block.self_attn.attention_fn for block in blocks}
        assert [function.args for function in functions] == [(attention,)]


def test_it_is_not_used_without_compilation_nor_with_a_mask_or_dropout():
    layer = nn.Module()
    layer.attention_fn = lambda *_, **__: ORIGINALS
    install_cpu_attention(layer)
    q, k, v, _ = (x.requires_grad_() for x in inputs(LENGTHS.start, torch.bfloat16))
    assert layer.attention_fn(q, k, v, None, causal=True, dropout=0.0) is ORIGINALS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the compiler
@pytest.mark.parametrize("size", [16, 64])
def test_compiled_it_is_as_exact_and_keeps_weights_of_short_sequences_but_no_scores_for_the_backward_pass(size):
    given, kept = inputs(256, torch.bfloat16, size=size), []
    compiled = torch.compile(causal_attention, dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        found = errors(compiled, given)
    for own, torchs_own in zip(found, errors(torchs, given), strict=True):
        assert own < 1.3 * torchs_own
    weights = [saved for saved in kept if saved.shape[-2:] in {(128, 128), (128, 256)}]  # of two blocks of queries
    assert [saved.dtype for saved in weights] == [torch.bfloat16] * (2 if size == 64 else 0)
    others = [saved.numel() for saved in kept if saved.shape[-2:] not in {(128, 128), (128, 256)}]
    assert max(others) < 2 * given[0].numel()
