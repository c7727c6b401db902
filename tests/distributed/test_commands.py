"""report, evaluate and generate on what a small run left: what they take, and what they say of what they cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from dist_trainer import evaluate, generate, report
from dist_trainer.config.schema import ModelConfig
from dist_trainer.errors import ConfigError
from dist_trainer.models.registry import ModelContext
from tests.distributed.small_runs import changed, command, folder, run, small_config, stop_after, weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 4 steps with 32 positions, on a text of its own."""
    data = tmp_path_factory.mktemp("text") / "text.txt"
    data.write_text("It was a truth that nobody acknowledged. " * 200)
    config = small_config(data, tmp_path_factory.mktemp("runs"), train__max_steps=4)
    assert run(config, 1) == [0]
    return folder(config)


def test_report_takes_a_checkpoint_for_its_run(trained, capsys):
    (trained / "report.html").unlink()
    assert report.main([str(trained / "checkpoints" / "latest")]) == 0
    assert (trained / "report.html").is_file()
    assert report.main([str(trained / "logs")]) == 2
    assert "is not a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("order", [0, 1])
def test_values_of_keys_are_not_taken_for_the_run(trained, order):
    keys = ["--batch.global_batch_size", "4", "--seed=7", "--data", "other"]
    argv = [*keys, str(trained)] if order else [str(trained), *keys]
    asked = evaluate.parse_arguments(argv)
    config = asked.config
    assert asked.path == trained
    assert (config.batch.global_batch_size, config.seed, config.data.dataset) == (4, 7, "other")


def test_a_model_without_its_run_is_evaluated_at_its_own_context(trained, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(trained / "checkpoints" / "latest", alone, symlinks=False)
    assert evaluate.parse_arguments([str(alone)]).config.data.sequence_length == 32
    assert evaluate.parse_arguments([str(alone), "--data.sequence_length", "16"]).config.data.sequence_length == 16
    (tmp_path / "mine.yaml").write_text("data: {sequence_length: 8}\n")
    assert evaluate.parse_arguments([str(alone), "--config", str(tmp_path / "mine.yaml")]).config.data.sequence_length == 8


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "nan"), ("--temperature", "inf"), ("--seed", "99999999999999999999"), ("--top_p", "nan")],
)
def test_impossible_numbers_are_rejected(trained, option, value):
    with pytest.raises(ConfigError, match=f"{option}: "):
        generate.parse_arguments([str(trained), option, value])


def test_the_smallest_temperature_takes_the_likeliest_token(trained, capsys):
    said = []
    for temperature in ("0", "1e-40", "5e-324"):
        assert generate.main([str(trained), "--prompt", "It was", "--max_new_tokens", "5", "--temperature", temperature]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]


def test_too_long_prompts_of_a_file_are_all_named_before_any_is_continued(trained, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("It was\n\n" + "a truth " * 40 + "\nnobody\n" + "b c " * 60 + "\n")
    assert generate.main([str(trained), "--prompts_file", str(prompts), "--max_new_tokens", "2"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{prompts}:3: the prompt has" in said.err
    assert f"{prompts}:5: the prompt has" in said.err


def test_a_typed_prompt_that_is_too_long_does_not_end_the_session(trained, capsys, monkeypatch):
    typed = iter(["a truth " * 40, "It was", ""])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert generate.main([str(trained), "--max_new_tokens", "2"]) == 0
    said = capsys.readouterr()
    assert "shorten it" in said.err
    assert said.out.startswith("It was")


def test_text_that_ends_with_the_context_says_so(trained, capsys):
    assert generate.main([str(trained), "--prompt", "It was", "--max_new_tokens", "100", "--temperature", "0"]) == 0
    assert "the model's context of 32 is full" in capsys.readouterr().err


def test_a_reader_that_has_had_enough_is_no_error(trained):
    words = [sys.executable, "-m", "dist_trainer.generate", str(trained), "--prompt", "It was", "--max_new_tokens", "4"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def gpt2(config: ModelConfig, context: ModelContext) -> nn.Module:
    """A model of transformers' own."""
    shape = {"n_embd": config.hidden_size, "n_layer": 1, "n_head": 2, "n_positions": context.sequence_length}
    torch.manual_seed(context.seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=context.vocabulary_size, **shape))
    return model.to(context.device)


def bare(config: ModelConfig, context: ModelContext) -> nn.Module:
    """A module that nothing but its code describes."""
    torch.manual_seed(context.seed)
    return nn.Sequential(nn.Embedding(context.vocabulary_size, 8), nn.Linear(8, context.vocabulary_size)).to(context.device)


def test_a_hugging_face_model_of_ones_own_is_saved_as_transformers_opens_it(stories, tmp_path, capsys):
    config = small_config(stories, tmp_path, model__name=f"{__name__}:gpt2", train__max_steps=4)
    run(config, 1, before=stop_after(2))
    assert run(config, 1) == [0]
    checkpoint = folder(config) / "checkpoints" / "latest"
    model, said = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert isinstance(model, transformers.GPT2LMHeadModel)
    assert not said["missing_keys"]
    assert torch.equal(model.state_dict()["transformer.wpe.weight"], weights(config)["transformer.wpe.weight"])
    assert generate.main([str(folder(config)), "--prompt", "x", "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("x")


def test_for_a_model_that_only_its_code_describes_the_commands_say_what_they_cannot_do(stories, tmp_path, capsys):
    config = small_config(stories, tmp_path, model__name=f"{__name__}:bare", train__max_steps=2)
    assert run(config, 1) == [0]
    for main in (generate.main, evaluate.main):
        for path in (folder(config), folder(config) / "checkpoints" / "latest"):
            assert main([str(path), *(["--prompt", "x"] if main is generate.main else [])]) == 2
            assert "is a checkpoint of a model of your own (model.name), without config.json" in capsys.readouterr().err


def test_a_model_that_cannot_keep_documents_apart_is_rejected_before_training(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path, model__name=f"{__name__}:bare", train__max_steps=2, data__document_mask=True)
    assert command(config, 1) == [2]
    assert "data.document_mask: is true, but the forward of Sequential takes no `document_ids`" in capfd.readouterr().err
    assert run(changed(config, data__packing=False), 1) == [0]  # where each has a row of its own
