"""What a command line of dist_trainer.evaluate means."""

from dataclasses import replace

import pytest

from dist_trainer.config.loading import dump_config
from dist_trainer.config.schema import DataConfig, TrainingConfig
from dist_trainer.errors import ConfigError
from dist_trainer.evaluate import parse_arguments


def test_other_data_do_not_take_the_configuration_of_the_run_s_own(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    config = TrainingConfig(data=DataConfig(dataset="squad", dataset_config="plain_text"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert parse_arguments([str(tmp_path)])[1].data.dataset_config == "plain_text"
    words = [str(tmp_path), "--data", "./other.jsonl"]
    assert parse_arguments(words)[1].data.dataset_config is None
    assert parse_arguments([*words, "--data.dataset_config", "b"])[1].data.dataset_config == "b"


def test_conversations_are_written_by_the_template_that_was_saved_with_the_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    config = TrainingConfig(data=DataConfig(messages_column="messages", chat_template="gone.jinja"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    evaluated = parse_arguments([str(tmp_path)])[1].data
    assert evaluated == replace(config.data, chat_template=None, tokenizer=str(tmp_path))
    assert parse_arguments([str(tmp_path), "--data.chat_template", "other.jinja"])[1].data.chat_template == "other.jinja"


@pytest.mark.parametrize(
    ("words", "said"), [(["--preset", "10m"], "--preset: is for training"), (["--dry_run"], "dry_run: no such key")]
)
def test_what_is_for_training_alone_is_refused(tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        parse_arguments([str(tmp_path), *words])
