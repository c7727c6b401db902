"""On a CUDA device: the same equalities as on CPU, to the accuracy of its formats."""

import gzip
import json
import pickle
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.fp16_loss import errors, in_chunks, plain_amp, problem_of
from dist_trainer.checkpoint.digest import weights_digest
from dist_trainer.checkpoint.host_copy import PinnedMemory, start_host_copy
from dist_trainer.checkpoint.state import Progress, take_snapshot
from dist_trainer.config.schema import ModelConfig
from dist_trainer.models.attention import attention, dense_document_mask
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.parallel.compile import compile_model
from dist_trainer.run.dry_run import dry_run
from tests.distributed.ranks import run_ranks
from tests.distributed.small_runs import folder, losses, metrics, run, small_config, status, stop_after

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


def test_a_stopped_run_resumes_with_the_same_losses(texts, tmp_path):
    undisturbed, config = small_config(texts, tmp_path / "a"), small_config(texts, tmp_path / "b")
    run(undisturbed, 1)
    run(config, 1, before=stop_after(5))
    run(config, 1)
    assert losses(config) == pytest.approx(losses(undisturbed), abs=1e-3)


def test_profiled_steps_leave_kernels_and_the_memory_s_history(texts, tmp_path):
    config = small_config(texts, tmp_path, profile__steps="5-6")
    assert run(config, 1) == [0]
    profile = folder(config) / "profile"
    events = json.loads(gzip.decompress((profile / "steps-5-6-rank0.json.gz").read_bytes()))["traceEvents"]
    assert {"step 5", "step 6"} <= {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert any(event.get("cat") == "kernel" for event in events)
    history = pickle.loads((profile / "steps-5-6-rank0.memory.pickle").read_bytes())
    assert history["segments"]
    assert any(history["device_traces"])


def test_a_batch_that_does_not_fit_ends_in_numbers_and_remedies(texts, tmp_path):
    config = small_config(texts, tmp_path, precision__dtype="bf16", batch__micro_batch_size=8)

    def need_more_than_there_is(trainer):
        loss = trainer.loss_function
        trainer.loss_function = lambda model, batch: loss(model, batch) + torch.ones(1 << 45, device="cuda").sum()

    with pytest.raises(AssertionError, match="OutOfMemoryError"):
        run(config, 1, before=need_more_than_there_is)
    reason = "out of memory in step 1, training: rank 0 requested 128 TiB more on cuda:0, which has "
    assert status(config)["reason"].startswith(reason)


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
            compile_model(model)
        loss = model(tokens.to(device), tokens.roll(-1, 1).to(device), document_ids=None if apart is None else apart.to(device))
        loss.backward()
        found.append(model.layers[0].self_attn.q_proj.weight.grad.cpu())
    exact, flex, together = found
    torch.testing.assert_close(flex, exact, atol=0.05, rtol=0.01)  # of at most 7
    assert (together - exact).abs().max() > 1


def test_a_dry_run_reports_how_much_of_the_gpu_it_took(texts, tmp_path, capfd):
    config = small_config(texts, tmp_path)
    assert run_ranks(1, lambda: dry_run(config)) == [0]
    assert re.search(r"memory +at most \S+ MiB \(\d+%\) of a GPU's \S+ GiB", capfd.readouterr().err)
    assert not folder(config).exists()


def test_snapshots_reuse_pinned_memory_of_exactly_their_size_and_hold_what_the_gpu_holds():
    model = torch.nn.Linear(512, 300, device="cuda")
    model.weight = torch.nn.Parameter(torch.randn(512, 300, device="cuda").t())  # strided
    optimizer, pinned = torch.optim.AdamW(model.parameters()), PinnedMemory()
    addresses = set()
    for step in range(3):
        model(torch.ones(4, 512, device="cuda")).sum().backward()
        optimizer.step()
        snapshot = take_snapshot(model, optimizer, scaler={}, progress=Progress(step), metadata={}, pinned=pinned)
        assert all(tensor.is_pinned() and tensor.is_contiguous() for tensor in snapshot.weights.values())
        assert all(torch.equal(snapshot.weights[name], tensor.cpu()) for name, tensor in model.state_dict().items())
        addresses.add(snapshot.weights["weight"].data_ptr())
        del snapshot
    assert len(addresses) == 1
    assert torch.zeros(1, device="cuda").item() == 0, "no error is left behind"


def test_copies_for_digests_hold_what_was_there_when_they_were_started_and_the_host_does_not_wait_for_them():
    weights = {"a": torch.randn(4096, 4096, device="cuda"), "strided": torch.randn(300, 512, device="cuda").t()}
    before, pinned = {name: tensor.cpu() for name, tensor in weights.items()}, PinnedMemory()
    start_host_copy(weights, pinned=pinned).wait()  # pins
    torch.cuda._sleep(1 << 30)  # the step before is still computed
    copy = start_host_copy(weights, pinned=pinned)
    for tensor in weights.values():
        tensor.zero_()  # the next step
    assert copy.done is not None
    assert not copy.done.query()
    assert all(tensor.is_pinned() for tensor in copy.tensors.values())
    assert all(torch.equal(copy.wait()[name], tensor) for name, tensor in before.items())
    assert weights_digest(copy.tensors.items()) == weights_digest(before.items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_two_gpus_by_nccl_have_the_curve_of_one(texts, tmp_path):
    one, two = small_config(texts, tmp_path / "1"), small_config(texts, tmp_path / "2")
    run(one, 1)
    run(two, 2)
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_two_gpus_tell_what_their_exchange_costs(texts, tmp_path):
    config = small_config(texts, tmp_path, profile__steps="5-8")
    run(config, 2)
    (line,) = metrics(config, "profile")
    assert 0 <= line["comm_exposed_ms"] <= line["comm_ms"]
    assert line["comm_ms"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "exact document mask"])
def test_grouped_attention_never_writes_out_all_scores(dtype, masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 256, 64, generator=generator) for heads in (8, 2, 2))
    documents = torch.arange(256).div(100, rounding_mode="floor").int().expand(2, -1)
    mask = dense_document_mask(documents, torch.float32) if masked else None
    expected = attention(q, k, v, mask, causal=not masked, dropout=0.0)
    on_gpu = [x.to("cuda", dtype).requires_grad_() for x in (q, k, v)]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        found = attention(
            *on_gpu, dense_document_mask(documents.cuda(), dtype) if masked else None, causal=not masked, dropout=0.0
        )
        found.sum().backward()
    torch.testing.assert_close(found.float().cpu(), expected, atol=1e-2 if dtype == torch.float16 else 1e-3, rtol=1e-2)


def test_in_fp16_the_loss_in_chunks_is_as_exact_as_plain_amp():
    problem = problem_of(50257, hidden_size=64, tokens=512, device="cuda")
    usual, ours = (errors(function, problem, scale=65536.0) for function in (plain_amp, in_chunks))
    assert all(ours[what] < 1.05 * usual[what] for what in usual)
