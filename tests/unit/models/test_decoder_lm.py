"""DecoderLM is Hugging Face's Llama: same weights, same logits, in both directions."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dist_trainer.config.schema import ModelConfig
from dist_trainer.errors import CheckpointError, ConfigError
from dist_trainer.generation.decoding import DecodingOptions, generate
from dist_trainer.models import loss
from dist_trainer.models.decoder_lm import DecoderLM, KeyValueCache
from dist_trainer.models.loss import LogitLoss, cross_entropy_sum, linear_cross_entropy_sum, takes

VOCABULARY = 61
SMALL = ModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def small(**changes) -> ModelConfig:
    return ModelConfig(**{**SMALL.__dict__, **changes})


def build(config: ModelConfig = SMALL, *, seed: int = 0) -> DecoderLM:
    with torch.device("meta"):
        model = DecoderLM(config, VOCABULARY, 64, bos_token_id=1, eos_token_id=2)
    model.to_empty(device="cpu").init_weights(seed)
    # Norms that are not all ones, so that a forgotten one shows.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += torch.linspace(-0.3, 0.3, parameter.numel())
            else:
                parameter *= 5
    return model


def tokens(rows: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


CONFIGS = {
    "grouped and tied": SMALL,
    "untied": small(tie_word_embeddings=False),
    "multi-head": small(num_key_value_heads=4),
    "one key head, other theta and eps": small(num_key_value_heads=1, rope_theta=5e5, rms_norm_eps=1e-3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_has_the_same_logits_in_transformers(tmp_path, name):
    model = build(CONFIGS[name])
    model.save_pretrained(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype is torch.float32
    difference = (model(tokens()) - theirs(tokens()).logits).abs().max()
    assert difference < 1e-5
    assert theirs.generation_config.eos_token_id == 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_a_transformers_model_has_the_same_logits_here(tmp_path, tied, shards):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    ours = DecoderLM.from_pretrained(tmp_path)
    assert ours.config.tie_word_embeddings == tied
    assert (ours(tokens()) - theirs(tokens()).logits).abs().max() < 1e-5


def test_greedy_generation_equals_that_of_transformers(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    prompt = [3, 14, 15, 9]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(generate(model, prompt, DecodingOptions(max_new_tokens=20, temperature=0))) == expected[0, 4:].tolist()


def test_the_cache_changes_no_logits():
    model = build().eval()
    row = tokens(1, 12)
    cache = KeyValueCache(2)
    parts = [model(row[:, :7], cache=cache)] + [model(row[:, i : i + 1], cache=cache) for i in range(7, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(row), atol=1e-5, rtol=0)


def test_sampling_follows_its_own_seed_and_leaves_training_alone():
    model = build().train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = list(generate(model, [1], DecodingOptions(max_new_tokens=8, seed=3, top_k=20, top_p=0.9)))
    assert first == list(generate(model, [1], DecodingOptions(max_new_tokens=8, seed=3, top_k=20, top_p=0.9)))
    assert first != list(generate(model, [1], DecodingOptions(max_new_tokens=8, seed=4, top_k=20, top_p=0.9)))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_generation_ends_with_the_context_and_rejects_what_does_not_fit():
    model = build()
    assert len(list(generate(model, [1] * 60, DecodingOptions(max_new_tokens=20)))) == 4
    with pytest.raises(ConfigError, match="64"):
        next(generate(model, [1] * 64, DecodingOptions(max_new_tokens=1)))
    with pytest.raises(ConfigError, match="empty"):
        next(generate(model, [], DecodingOptions(max_new_tokens=1)))


def test_with_targets_the_forward_pass_gives_the_sum_of_token_losses():
    model = build()
    targets = tokens().roll(-1, dims=1)
    targets[0, :5] = -100
    expected = F.cross_entropy(model(tokens()).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(model(tokens(), targets), expected)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 40, None])
def test_the_loss_in_chunks_has_the_same_value_and_gradients(chunk_tokens, monkeypatch):
    monkeypatch.setattr(loss, "CACHED_ROWS", 16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 8, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (40,), generator=generator)
    targets[3] = -100
    whole = cross_entropy_sum(hidden @ weight.T, targets)
    whole_gradients = torch.autograd.grad(whole, (hidden, weight))
    parts = linear_cross_entropy_sum(hidden, weight, targets, logit_loss=LogitLoss(), chunk_tokens=chunk_tokens)
    part_gradients = torch.autograd.grad(parts, (hidden, weight))
    assert abs(parts - whole) / whole < 1e-6
    for ours, theirs in zip(part_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        alone = linear_cross_entropy_sum(hidden, weight, targets, logit_loss=LogitLoss(), chunk_tokens=chunk_tokens)
    assert abs(alone - whole) / whole < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_in_chunks_rounds_no_more_than_autocast_does(dtype, monkeypatch):
    monkeypatch.setattr(loss, "CACHED_ROWS", 16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 64, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, 64, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (600,), generator=generator)
    exact = torch.autograd.grad(cross_entropy_sum(hidden @ weight.T, targets), (hidden, weight))
    with torch.autocast("cpu", dtype=dtype):
        usual = torch.autograd.grad(cross_entropy_sum(F.linear(hidden, weight), targets), (hidden, weight))
        parts = linear_cross_entropy_sum(hidden, weight, targets, logit_loss=LogitLoss(), chunk_tokens=256)
    ours = torch.autograd.grad(parts, (hidden, weight))
    for mine, theirs, true in zip(ours, usual, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() < 1.05 * (theirs - true).norm()


def test_what_a_compiler_is_given_for_the_loss_computes_the_same():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (40,), generator=generator)
    targets[3] = -100
    compiled = torch.compile(LogitLoss(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, targets), LogitLoss()(logits, targets))


def test_the_loss_never_holds_the_logits_of_the_whole_batch():
    """By what autograd keeps: hidden states and gradients of D numbers a token, never V."""
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(VOCABULARY, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        linear_cross_entropy_sum(hidden, weight, torch.zeros(64, dtype=torch.long), logit_loss=LogitLoss(), chunk_tokens=8)
    assert kept
    assert sum(kept) <= hidden.numel() + weight.numel()


def test_a_second_backward_pass_through_the_loss_is_rejected_and_not_wrong():
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(VOCABULARY, 8, requires_grad=True)
    loss = linear_cross_entropy_sum(hidden, weight, torch.zeros(64, dtype=torch.long), logit_loss=LogitLoss(), chunk_tokens=8)
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_initialisation_follows_its_table_and_its_seed():
    config = small(hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    models = []
    for seed in (0, 0, 1):
        model = DecoderLM(config, VOCABULARY, 64)
        model.init_weights(seed)
        models.append(model)
    state = models[0].state_dict()
    assert all(torch.equal(value, models[1].state_dict()[name]) for name, value in state.items())
    assert not torch.equal(state["embed_tokens.weight"], models[2].state_dict()["embed_tokens.weight"])
    assert state["embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["layers.1.self_attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["layers.1.mlp.down_proj.weight"].std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert (state["norm.weight"] == 1).all()


def test_a_parameter_outside_the_table_is_an_error():
    model = DecoderLM(SMALL, VOCABULARY, 64)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        model.init_weights(0)


def test_dropout_drops_while_training_only():
    model = build(small(dropout=0.5))
    assert not torch.equal(model.train()(tokens()), model(tokens()))
    assert torch.equal(model.eval()(tokens()), model(tokens()))


@pytest.mark.parametrize("place", ["embedding", "attention weights", "after attention", "after feed-forward"])
def test_each_place_that_is_documented_to_drop_drops(place):
    model = build(small(dropout=0.5)).train()
    with torch.no_grad():
        for block in model.layers:
            block.self_attn.o_proj.weight *= place != "after feed-forward"
            block.mlp.down_proj.weight *= place != "after attention"
            block.self_attn.dropout *= place == "attention weights"
            block.dropout.p *= place.startswith("after")
    model.dropout.p *= place == "embedding"
    assert not torch.equal(model(tokens()), model(tokens()))


def test_flops_count_every_matrix_once_and_causal_attention_by_half():
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 32 * VOCABULARY
    assert build().flops_per_token(64) == 6 * matrices + 2 * 6 * 32 * 64


REFUSED = {
    "model_type": ("gpt2", "model_type"),
    "attention_bias": (1, "attention_bias"),
    "hidden_size": (30, "hidden_size is 30"),
    "partial_rotary_factor": (0.5, "partial_rotary_factor"),
    "quantization_config": ({"quant_method": "gptq"}, "quantization_config"),
    "layer_types": (["full_attention", "sliding_attention"], "layer_types"),
    "rope_scaling": ({"type": "dynamic", "factor": 2.0}, r"rope_scaling\.rope_type is 'dynamic'"),
    "hidden_act": ("gelu", "hidden_act"),
    "rope_parameters": ({"rope_type": "yarn", "rope_theta": 1e4}, r"rope_parameters\.rope_type is 'yarn'"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_decoder_lm_cannot_represent_is_rejected_by_naming_the_field(tmp_path, field):
    import json

    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    value, named = REFUSED[field]
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ConfigError, match=named):
        DecoderLM.from_pretrained(tmp_path)


def test_damaged_or_missing_weights_end_in_a_message(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run folder"):
        DecoderLM.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        DecoderLM.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        DecoderLM.from_pretrained(tmp_path)


def test_models_that_sum_their_own_loss_are_known():
    assert takes(build(), "targets")
    assert not takes(torch.nn.Linear(2, 2), "targets")


def test_a_wrapper_of_one_s_own_is_seen_through():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = build()

        def forward(self, *inputs, **named):
            return self.module(*inputs, **named)

    assert takes(Wrapper(), "targets")
