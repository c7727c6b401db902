"""Pretrained models are loaded and saved completely: every tensor, end token and generation setting is kept, or named."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from dist_trainer.config.schema import ModelConfig
from dist_trainer.errors import CheckpointError, RefusedError
from dist_trainer.generation.decoding import DecodingOptions, end_tokens, generate
from dist_trainer.huggingface import transformers_models
from dist_trainer.huggingface.initial_model import derived_keys
from dist_trainer.models.registry import ModelContext, build_model
from dist_trainer.models.weights import load_weights, make_weight_saver, open_model

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {"llama": "decoder_lm", "qwen2": "hf"}
CONTEXT = ModelContext(vocabulary_size=61, sequence_length=16, seed=0, device=torch.device("cpu"), eos_token_id=2)


def saved(path: Path, kind: str, **shape) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **shape})).save_pretrained(path)
    return path


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def built(kind: str, folder: Path, context: ModelContext) -> torch.nn.Module:
    asked = {"model.name": KINDS[kind], "model.init_from": str(folder)}
    shape = {key.removeprefix("model."): value for key, value in {**asked, **derived_keys(asked)}.items() if "model." in key}
    return build_model(ModelConfig(**shape), context)


def written(model: torch.nn.Module, folder: Path) -> Path:
    """A checkpoint of `model`."""
    folder.mkdir()
    make_weight_saver(model)(model.state_dict(), folder)
    return folder


def generation_settings(folder: Path) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


# ------------------------------------------------------------------------------------------------- where texts end

ENDS = {
    "config.json alone": ({"eos_token_id": [2, 5]}, {"eos_token_id": None}, [2, 5]),
    "a list in generation_config.json alone": ({"eos_token_id": 2}, {"eos_token_id": [2, 5]}, [2, 5]),
    "another one in each": ({"eos_token_id": 9}, {"eos_token_id": 2}, [2, 9]),
}


@pytest.mark.parametrize("trained", [2, 7])
@pytest.mark.parametrize("case", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_the_trained_end_token_in_addition_to_its_source_s_and_all_other_settings(
    tmp_path, kind, case, trained
):
    config, generation, ends = ENDS[case]
    folder = saved(tmp_path / "source", kind)
    change(folder / "config.json", **config)
    change(folder / "generation_config.json", do_sample=True, temperature=0.5, top_k=7, max_new_tokens=9, **generation)
    model = built(kind, folder, replace(CONTEXT, eos_token_id=trained))
    first = written(model, tmp_path / "first")
    if trained not in (ends if isinstance(ends, list) else [ends]):
        ends = [trained, *(ends if isinstance(ends, list) else [ends])]
    settings = GenerationConfig.from_pretrained(first)
    assert settings.eos_token_id == ends
    assert (settings.temperature, settings.top_k, settings.max_new_tokens, settings.do_sample) == (0.5, 7, 9, True)
    in_config = AutoConfig.from_pretrained(first).eos_token_id
    assert trained in (in_config if isinstance(in_config, list) else [in_config])
    expected = set(ends) if isinstance(ends, list) else {ends}
    assert end_tokens(model) == end_tokens(open_model(first)) == expected

    resumed = built(kind, folder, replace(CONTEXT, eos_token_id=trained, resumed_from=first))
    load_weights(resumed, first)
    second = written(resumed, tmp_path / "second")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (second / name).read_bytes() == (first / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_generate_stops_where_transformers_stops(tmp_path, kind):
    folder = saved(tmp_path / "source", kind)
    prompt = [4, 8, 15]

    def theirs(path: Path) -> list[int]:
        model, row = AutoModelForCausalLM.from_pretrained(path), torch.tensor([prompt])
        return model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=20)[0, 3:].tolist()

    text = theirs(folder)
    end = text[5]
    change(folder / "generation_config.json", eos_token_id=[60, end])
    stopped = theirs(folder)
    assert stopped == text[: text.index(end) + 1]
    checkpoint = written(built(kind, folder, CONTEXT), tmp_path / "checkpoint")
    for path in (folder, checkpoint):
        model = open_model(path)
        greedy = DecodingOptions(max_new_tokens=20, temperature=0)
        ours = list(generate(model, prompt, greedy, end_token_ids=end_tokens(model)))
        assert [*ours, end] == stopped == theirs(path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_end_leaves_the_files_unchanged(tmp_path, kind):
    folder = saved(tmp_path / "source", kind)
    checkpoint = written(built(kind, folder, CONTEXT), tmp_path / "checkpoint")
    assert generation_settings(checkpoint) == generation_settings(folder)
    assert json.loads((checkpoint / "config.json").read_text())["eos_token_id"] == 2


def test_generation_settings_of_a_folder_without_weights_are_kept_too(tmp_path):
    folder = saved(tmp_path / "source", "qwen2")
    change(folder / "generation_config.json", do_sample=True, temperature=0.5, eos_token_id=[2, 5])
    (folder / "model.safetensors").unlink()
    checkpoint = written(built("qwen2", folder, replace(CONTEXT, eos_token_id=7)), tmp_path / "checkpoint")
    settings = GenerationConfig.from_pretrained(checkpoint)
    assert (settings.temperature, settings.eos_token_id) == (0.5, 7)  # the text's end alone: this model has learnt no other


# --------------------------------------------------------------------------------------------------- every tensor


def add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: tensor}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_matrix_may_be_saved_under_the_head_s_name_alone(tmp_path, kind):
    folder = saved(tmp_path, kind, tie_word_embeddings=True)
    before, path = open_model(folder), folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    assert all(map(torch.equal, open_model(folder).parameters(), before.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_untied_head_where_config_json_says_tied_is_rejected(tmp_path, kind):
    folder = saved(tmp_path / "source", kind, tie_word_embeddings=True)
    before = open_model(folder)
    add_tensor(folder, "lm_head.weight", load_file(folder / "model.safetensors")["model.embed_tokens.weight"])
    same = open_model(folder)
    assert all(map(torch.equal, same.parameters(), before.parameters()))
    checkpoint = written(built(kind, folder, CONTEXT), tmp_path / "checkpoint")
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")

    resumed = built(kind, folder, replace(CONTEXT, resumed_from=checkpoint))
    for path in (folder, checkpoint):
        add_tensor(path, "lm_head.weight", torch.randn(61, 32))
    for read in (
        lambda: open_model(folder),
        lambda: built(kind, folder, CONTEXT),
        lambda: load_weights(resumed, checkpoint),
        lambda: transformers_models.load_model(folder),
    ):
        with pytest.raises(CheckpointError, match=r"contain an output head \(lm_head\.weight\) that differs from"):
            read()
    change(folder / "config.json", tie_word_embeddings=False)
    assert torch.equal(open_model(folder).lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_json_of_a_larger_model_than_the_files_is_rejected_before_memory_is_taken(tmp_path, kind):
    folder = saved(tmp_path, kind)
    change(folder / "config.json", vocab_size=2**31 - 1)
    for read in (lambda: open_model(folder), lambda: built(kind, folder, CONTEXT)):
        with pytest.raises(RefusedError, match=r"do not fit|are incomplete|cannot build a causal language model"):
            read()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_the_model_has_no_use_for_is_named(tmp_path, kind, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dist_trainer"), "propagate", True)
    folder = saved(tmp_path, kind)
    add_tensor(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))  # can be derived
    open_model(folder)
    assert not caplog.records
    add_tensor(folder, "v_head.summary.weight", torch.ones(1, 32))
    if kind == "llama":
        with pytest.raises(CheckpointError, match=r"contain v_head\.summary\.weight, which its config\.json does not describe"):
            open_model(folder)
    else:
        open_model(folder)
        assert "contain 1 tensor that Qwen2ForCausalLM does not use: v_head.summary.weight" in caplog.text
