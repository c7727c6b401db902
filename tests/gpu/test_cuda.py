"""On a CUDA device: the same equalities as on CPU, to the accuracy of its formats."""

import pytest
import torch

from dist_trainer.config.schema import ModelConfig
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.parallel.registry import compile_blocks
from tests.distributed.small_runs import losses, metrics, run, small_config, stop_after

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"text": "Letter {n}. {"All is well here. " * (n + 10)}"}}\n' for n in range(40)))
    return path


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_run_learns_on_the_gpu_in_every_format(texts, tmp_path, dtype):
    config = small_config(texts, tmp_path, precision__dtype=dtype)
    assert run(config, 1) == [0]
    assert losses(config)[-1] < losses(config)[0] - 0.5
    assert metrics(config)[-1]["peak_memory_bytes"] > 0


def test_a_stopped_run_goes_on_with_the_same_losses(texts, tmp_path):
    undisturbed, config = small_config(texts, tmp_path / "a"), small_config(texts, tmp_path / "b")
    run(undisturbed, 1)
    run(config, 1, before=stop_after(5))
    run(config, 1)
    assert losses(config) == pytest.approx(losses(undisturbed), abs=1e-3)


@pytest.mark.filterwarnings("ignore")  # those of the compiler
@pytest.mark.parametrize("compiles", [True, False])
def test_flex_attention_keeps_documents_apart_as_the_exact_mask_does(compiles):
    config = ModelConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    tokens = torch.randint(0, 512, (3, 300), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(300) // torch.tensor([[7], [150], [300]])).int()
    found = []
    for device, apart in (("cpu", documents), ("cuda", documents), ("cpu", None)):
        model = DecoderLM(config, 512, 300)
        model.init_weights(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 5 if parameter.dim() > 1 else 1  # attention that is far from even
        model.to(device)
        if compiles and device == "cuda":
            compile_blocks(model)
        loss = model(tokens.to(device), tokens.roll(-1, 1).to(device), documents=None if apart is None else apart.to(device))
        loss.backward()
        found.append(model.layers[0].self_attn.q_proj.weight.grad.cpu())
    exact, flex, together = found
    torch.testing.assert_close(flex, exact, atol=0.05, rtol=0.01)  # of at most 7
    assert (together - exact).abs().max() > 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_two_gpus_by_nccl_have_the_curve_of_one(texts, tmp_path):
    one, two = small_config(texts, tmp_path / "1"), small_config(texts, tmp_path / "2")
    run(one, 1)
    run(two, 2)
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)
