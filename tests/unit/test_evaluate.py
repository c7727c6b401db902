"""What a command line of dist_trainer.evaluate means."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from dist_trainer.config.loading import dump_config
from dist_trainer.config.schema import CheckpointConfig, DataConfig, TrainingConfig
from dist_trainer.errors import ConfigError
from dist_trainer.evaluate import EvaluationRequest, main, parse_arguments, run


def test_other_data_do_not_take_the_configuration_of_the_run_s_own(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    config = TrainingConfig(data=DataConfig(dataset="squad", dataset_config="plain_text"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert parse_arguments([str(tmp_path)]).config.data.dataset_config == "plain_text"
    words = [str(tmp_path), "--data", "./other.jsonl"]
    assert parse_arguments(words).config.data.dataset_config is None
    assert parse_arguments([*words, "--data.dataset_config", "b"]).config.data.dataset_config == "b"


def test_messages_name_what_was_typed_and_not_the_keys_that_follow_from_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    tokenizer = ["--data.tokenizer", "austen"]
    assert main([str(tmp_path)]) == 2
    assert (
        f"dist_trainer: RUN: {tmp_path} has no tokenizer in it; give a folder with tokenizer.json\n" in capsys.readouterr().err
    )
    assert main([str(tmp_path), "--data.tokenizer", "./gone"]) == 2
    assert "dist_trainer: data.tokenizer: gone does not exist" in capsys.readouterr().err
    assert main([str(tmp_path), "--data", "./nowhere.jsonl", *tokenizer]) == 2
    assert "dist_trainer: --data: ./nowhere.jsonl does not exist" in capsys.readouterr().err
    assert main([str(tmp_path), "--data.validation_dataset", "./nowhere.jsonl", *tokenizer]) == 2
    assert "dist_trainer: data.validation_dataset: ./nowhere.jsonl does not exist" in capsys.readouterr().err


def test_conversations_are_written_by_the_template_that_was_saved_with_the_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    config = TrainingConfig(data=DataConfig(messages_column="messages", chat_template="gone.jinja"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    evaluated = parse_arguments([str(tmp_path)]).config.data
    assert evaluated == replace(config.data, chat_template=None, tokenizer=str(tmp_path))
    assert parse_arguments([str(tmp_path), "--data.chat_template", "other.jinja"]).config.data.chat_template == "other.jinja"


def test_a_run_is_evaluated_even_if_the_one_that_it_started_from_is_gone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    config = TrainingConfig(checkpoint=CheckpointConfig(resume=str(tmp_path / "gone")))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert parse_arguments([str(tmp_path)]).config.checkpoint.resume == "auto"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--harness", " ,"], "--harness: names no task"),
        (["--limit", "3"], "--limit: needs --harness"),
        (["--data", ""], "--data: must not be empty"),
        (["--harness", "a", "--limit", "0"], "--limit: 0 must be 1 or more"),
        (["--harness", "a", "--data", "b"], "--data and --harness: give only one of them"),
        (["--harness=a", "--data.sequence_length", "8"], "data.sequence_length: has no effect with --harness"),
    ],
)
def test_what_makes_no_sense_with_lm_eval_or_without_it_is_rejected(tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        parse_arguments([*words, str(tmp_path)])


def test_tasks_are_for_one_process(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="there are 2 ranks; start it without torchrun"):
        parse_arguments([str(tmp_path), "--harness", "a"])


def test_options_of_lm_eval_do_not_take_the_run_and_leave_precision_to_be_set(tmp_path):
    words = ["--apply_chat_template", str(tmp_path), "--harness", "a, b,", "--harness_tasks", "mine", "--num_fewshot=0"]
    asked = parse_arguments([*words, "--precision.dtype", "fp32"])
    assert asked.path == tmp_path
    given = {"tasks_folder": Path("mine"), "num_fewshot": 0, "apply_chat_template": True}
    assert asked.harness == {"tasks": ("a", "b"), **given}
    at_home = parse_arguments([str(tmp_path), "--harness=a,~/b.yaml", "--harness_tasks=~/mine"]).harness
    assert at_home == {"tasks": ("a", str(Path.home() / "b.yaml")), "tasks_folder": Path.home() / "mine"}
    assert asked.config.precision.dtype == "fp32"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "10m"], "--preset: applies to training only"),
        (["--dry_run"], "dry_run: no such key"),
        (["--model.dropout", "0.1"], "model.dropout: has no effect on the evaluation"),
        (["--data.num_workers=1", "--optim.learning_rate=1"], "optim.learning_rate: has no effect on the evaluation"),
        (["--optim.lr", "1"], "optim.lr: no such key; did you mean optim.learning_rate"),
    ],
)
def test_what_is_for_training_alone_is_rejected(tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        parse_arguments([str(tmp_path), *words])


def test_a_file_may_hold_keys_of_training(tmp_path):
    file = tmp_path / "training.yaml"
    file.write_text("data: {num_workers: 1}\noptim: {learning_rate: 1.0}\n")
    assert parse_arguments([str(tmp_path), "--config", str(file)]).config.data.num_workers == 1


def test_what_is_printed_is_json_even_if_a_number_is_not_finite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dist_trainer.run.evaluation.evaluate_model", lambda *_: {"loss": 800.0, "perplexity": math.inf})
    assert run(EvaluationRequest(tmp_path, TrainingConfig())) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {"loss": 800.0, "perplexity": None, "non_finite": {"perplexity": "inf"}}
