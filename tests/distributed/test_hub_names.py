"""`generate` and `evaluate` of a model that is named as on the Hub, out of the local cache, with no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM

from dist_trainer import evaluate, generate
from dist_trainer.data.datasets import CORPUS
from dist_trainer.run import evaluation
from dist_trainer.run.evaluation import evaluate_model
from tests.distributed.ranks import run_ranks
from tests.distributed.small_runs import folder, put_into_hub_cache, run, small_config

SHAPES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
}
"""One that DecoderLM is, and one that transformers' own code alone can be."""
TEXT = "It was a truth that nobody acknowledged, until Emma came. "


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model's folder of each kind, and a run's checkpoint."""
    here = tmp_path_factory.mktemp("models")
    for kind, shape in SHAPES.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **shape, vocab_size=4096, max_position_embeddings=64, initializer_range=0.3)
        AutoModelForCausalLM.from_config(config).save_pretrained(here / kind)
        for file in (CORPUS / "tokenizer").iterdir():
            shutil.copy(file, here / kind)
    (here / "text.txt").write_text(TEXT * 100)
    config = small_config(here / "text.txt", here, train__max_steps=2, data__validation_fraction=0.2)
    assert run(config, 1) == [0]
    shutil.copytree((folder(config) / "checkpoints" / "best").resolve(), here / "checkpoint")  # no part of the run any more
    return {kind: here / kind for kind in (*SHAPES, "checkpoint")}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The Hub's, empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def said(capsys, command, *words) -> str:
    assert command.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llama", "gpt2", "checkpoint"])
def test_a_name_means_what_its_folder_means(models, cache, tmp_path, kind, capsys):
    put_into_hub_cache(cache, "owner/model", (path for path in models[kind].iterdir() if path.is_file()))
    words = ("--prompt", "It was a truth", "--temperature", "0", "--max_new_tokens", "20")
    of_the_name = said(capsys, generate, "owner/model", *words)
    assert of_the_name == said(capsys, generate, models[kind], *words)
    assert len(of_the_name) > len("It was a truth\n")

    (tmp_path / "text.txt").write_text(TEXT * 30)
    data = ("--data", tmp_path / "text.txt", "--data.sequence_length", "32", "--precision.dtype", "fp32")
    found = json.loads(said(capsys, evaluate, "owner/model", *data))
    assert found == json.loads(said(capsys, evaluate, models[kind], *data))
    assert found["tokens"] > 100


def test_a_model_from_elsewhere_is_measured_at_its_own_context_whatever_its_config_calls_it(models):
    said = json.loads((models["gpt2"] / "config.json").read_text())
    assert "max_position_embeddings" not in said
    asked = evaluate.parse_arguments([str(models["gpt2"]), "--data", "austen"])
    assert asked.config.data.sequence_length == said["n_positions"]


def test_several_ranks_evaluate_a_name_and_one_speaks(models, cache, tmp_path):
    put_into_hub_cache(cache, "owner/model", models["llama"].iterdir())
    (tmp_path / "text.txt").write_text(TEXT * 30)
    config = evaluate.parse_arguments(["owner/model", "--data", str(tmp_path / "text.txt")]).config
    alone = evaluate_model(Path("owner/model"), config)
    assert run_ranks(2, lambda: evaluate_model(Path("owner/model"), config)) == [alone, None]


def test_lm_eval_gets_the_folder_of_a_name(models, cache, capsys, monkeypatch):
    put_into_hub_cache(cache, "owner/model", models["llama"].iterdir())
    asked = []
    monkeypatch.setattr(
        evaluation, "run_harness", lambda path, *_: asked.append(path) or {"results": {"letters": {"acc": 1.0}}}
    )
    found = json.loads(said(capsys, evaluate, "owner/model", "--harness", "letters"))
    assert asked == [cache / "models--owner--model" / "snapshots" / "0123"]
    assert (found["results"], found["file"]) == ({"letters": {"acc": 1.0}}, None)


@pytest.mark.parametrize("command", [generate, evaluate])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_name_whose_weights_are_not_in_the_cache_ends_in_a_sentence(models, cache, command, kind, capsys):
    described = [path for path in models[kind].iterdir() if path.suffix != ".safetensors"]
    put_into_hub_cache(cache, "owner/model", described)
    words = ["--prompt", "a"] if command is generate else []
    assert command.main(["owner/model", *words]) == 2
    complaint = capsys.readouterr().err
    assert "model.safetensors" in complaint
    assert str(cache) in complaint


@pytest.mark.parametrize("command", [generate, evaluate])
def test_what_is_neither_a_folder_nor_a_model_of_the_hub_is_rejected_with_both_remedies(cache, tmp_path, command, capsys):
    assert command.main(["owner/model"]) == 2
    complaint = capsys.readouterr().err
    assert "RUN: 'owner/model' is not a local path, and it is neither on disk in the Hub cache nor reachable" in complaint
    assert "run `hf download owner/model` with the same HF_HOME, or give a folder" in complaint
    for path in ("./nowhere", str(tmp_path / "gone")):
        assert command.main([path]) == 2
        assert "is not a folder; give a run, a checkpoint" in capsys.readouterr().err


def test_a_checkpoint_outside_of_the_cache_that_is_made_of_links_is_rejected(models, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for file in models["checkpoint"].iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    assert generate.main([str(tmp_path / "model"), "--prompt", "a"]) == 2
    assert "is a link out of its folder" in capsys.readouterr().err
