"""Checkpoints of the Llama family as transformers writes them: the same logits here, and once more when saved from here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dist_trainer.errors import CheckpointError, ConfigError
from dist_trainer.models.decoder_lm import DecoderLM

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMAS = {
    "Llama 2: as many key heads, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "Llama 3.2: llama3 scaling, tied": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "Llama 3.1: several ends": {"rope_parameters": LLAMA3, "eos_token_id": [5, 6, 7]},
    "SmolLM2: tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    "TinyLlama: one key head": {"num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "wide heads": {"head_dim": 20},
    "narrow heads": {"head_dim": 8},
    "biased attention": {"attention_bias": True},
    "biased feed-forward": {"mlp_bias": True},
    "everything": {"head_dim": 20, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
}


def draw(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and norms too, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return draw(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})))


def tokens(length: int = 100) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(5))


def same_logits(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LLAMAS)
def test_logits_are_those_of_transformers_there_and_back(tmp_path, name):
    theirs = llama(**LLAMAS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = DecoderLM.from_pretrained(tmp_path / "theirs")
    same_logits(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    back, said = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    same_logits(ours, back)
    assert back.config.eos_token_id == theirs.config.eos_token_id
    assert back.config.rope_parameters["rope_type"] == theirs.config.rope_parameters["rope_type"]


def test_scaling_changes_the_logits_of_this_test():
    """Or the equalities above would hold with no scaling at all."""
    plain, scaled = llama(), llama(rope_parameters={**LLAMA3, "rope_theta": 10000.0})
    assert (plain(tokens()).logits - scaled(tokens()).logits).abs().max() > 1e-2


def test_mistral_without_a_window(tmp_path):
    torch.manual_seed(1)
    theirs = draw(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)))
    theirs.save_pretrained(tmp_path)
    same_logits(DecoderLM.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("window", [64, "missing"])
def test_mistral_with_a_window_is_rejected_by_its_field(tmp_path, window):
    MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=64)).save_pretrained(tmp_path)
    if window == "missing":  # transformers takes its default then, which is a window
        raw = json.loads((tmp_path / "config.json").read_text())
        del raw["sliding_window"]
        (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="sliding_window is"):
        DecoderLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("style", ["type", "rope_type"])
def test_the_older_spelling_of_scaling_is_read(tmp_path, style):
    llama(rope_parameters=LLAMA3).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    raw["rope_scaling"] = {**scaling, style: scaling.pop("rope_type")}
    path.write_text(json.dumps(raw))
    same_logits(DecoderLM.from_pretrained(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_become_float32_weights(tmp_path, dtype):
    llama().to(dtype).save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ours = DecoderLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    same_logits(ours, LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())


def test_scaling_without_its_numbers_is_rejected_by_field(tmp_path):
    llama(rope_parameters=LLAMA3).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"high_freq_factor"', '"high_frequency"'))
    with pytest.raises(ConfigError, match=r"rope_parameters\.high_freq_factor is None"):
        DecoderLM.from_pretrained(tmp_path)


def test_weights_that_config_json_does_not_mention_are_not_ignored(tmp_path):
    llama(attention_bias=True).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"attention_bias": true', '"attention_bias": false'))
    with pytest.raises(CheckpointError, match=r"_proj\.bias, which its config\.json does not describe"):
        DecoderLM.from_pretrained(tmp_path)


MEASURE = """
import sys
from dist_trainer.models.decoder_lm import DecoderLM
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
DecoderLM.from_pretrained(sys.argv[2])  # what torch imports for the first model
before = kilobytes("VmHWM")
model = DecoderLM.from_pretrained(sys.argv[1])
print((kilobytes("VmHWM") - before) * 1024, sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc for the highest memory so far")
def test_reading_takes_the_model_and_one_file_of_memory(tmp_path):
    shape = {**SHAPE, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8000}
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(tmp_path / "large", max_shard_size="10MB")
    llama().save_pretrained(tmp_path / "small")
    largest = max(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    folders = [str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *folders], capture_output=True, text=True, check=True)
    peak, parameters = map(int, done.stdout.split())
    files = 2 * parameters
    # The weights in float32, the file that is being read, and some for the allocator; all files at once would be more.
    assert 4 * parameters <= peak < 4 * parameters + largest + 8 * 2**20 < 4 * parameters + files
