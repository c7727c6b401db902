"""Models of transformers: as skeletons for a checkpoint's weights, and what opening one takes of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dist_trainer.checkpoint.digest import digest_of_folder, weights_digest
from dist_trainer.errors import CheckpointError
from dist_trainer.huggingface import transformers_models
from dist_trainer.models.weights import make_weight_namer, make_weight_saver

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
KINDS = {
    "gemma": {**SHAPE, "head_dim": 16},  # a scale and rotary frequencies, in buffers that no file has
    "qwen3": {**SHAPE, "head_dim": 16, "tie_word_embeddings": True},
    "mixtral": {**SHAPE, "num_local_experts": 4},  # its files name its weights otherwise
    "xglm": {"vocab_size": 256, "d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64},  # sines, in a buffer
    "llama": {
        **SHAPE,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def save(kind: str, shape: dict, path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_skeleton_is_the_model_but_for_its_weights_which_then_come_from_the_files(tmp_path, kind):
    folder = save(kind, KINDS[kind], tmp_path)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "temperature": 0.5, "do_sample": True}))
    whole = transformers_models.load_model(folder)
    weights = (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    random_state = torch.get_rng_state()
    skeleton = transformers_models.build_without_weights(folder).eval()
    assert torch.equal(torch.get_rng_state(), random_state)
    weights.rename(folder / "model.safetensors")

    buffers, others = dict(skeleton.named_buffers()), dict(whole.named_buffers())
    assert buffers.keys() == others.keys()
    assert all(torch.equal(buffers[name], others[name]) for name in buffers)
    assert skeleton.config.to_dict() == whole.config.to_dict()
    assert skeleton.generation_config.to_dict() == whole.generation_config.to_dict()
    assert skeleton.generation_config.temperature == 0.5
    assert not all(map(torch.equal, skeleton.parameters(), whole.parameters()))

    transformers_models.load_weights(skeleton, folder)
    names = [name for name, _ in whole.named_parameters()]
    assert [name for name, _ in skeleton.named_parameters()] == names
    assert all(map(torch.equal, skeleton.parameters(), whole.parameters()))
    tokens = torch.randint(1, 256, (2, 16))
    with torch.no_grad():
        assert torch.equal(skeleton(tokens).logits, whole(tokens).logits)


def test_damaged_generation_settings_are_reported_as_such(tmp_path):
    folder = save("qwen3", KINDS["qwen3"], tmp_path)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is damaged"):
        transformers_models.build_without_weights(folder)


MEASURE = """
import sys
from pathlib import Path
from dist_trainer.huggingface import transformers_models

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

def peak(act):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    made = act()
    print(memory("VmHWM") - before)
    return made

tiny, full, half = map(Path, sys.argv[1:])
transformers_models.load_weights(transformers_models.load_model(tiny), tiny)  # imports all that is needed
skeleton = peak(lambda: transformers_models.build_without_weights(full))
peak(lambda: transformers_models.load_weights(skeleton, full))
del skeleton
opened = peak(lambda: transformers_models.load_model(full))
del opened
opened = peak(lambda: transformers_models.load_model(half))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is measured on Linux")
def test_opening_and_bringing_back_a_model_takes_memory_in_bounds(tmp_path):
    tiny = save("qwen3", KINDS["qwen3"], tmp_path / "tiny")
    large = {**KINDS["qwen3"], "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192}
    full, half = save("qwen3", large, tmp_path / "full"), tmp_path / "half"
    model = transformers_models.load_model(full)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.to(torch.bfloat16).save_pretrained(half)
    done = subprocess.run([sys.executable, "-c", MEASURE, tiny, full, half], capture_output=True, text=True, check=True)
    skeleton, copied, mapped, converted = (int(line) / size for line in done.stdout.split())
    assert skeleton < 0.2  # nothing was written to it
    assert 0.9 < copied < 2.2  # its own memory, and the file's pages
    assert mapped < 0.2
    assert 0.9 < converted < 1.7  # in float32, and the file's pages


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_weights_have_the_digest_of_the_file_they_are_saved_in_also_where_that_names_them_otherwise(tmp_path, kind):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
    model._keys_to_ignore_on_save = {"model.norm.weight"}  # as Marian's has names
    apart = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_weight_saver(model)(apart, tmp_path)
    assert weights_digest(make_weight_namer(model)(apart).items()) == digest_of_folder(tmp_path)
