"""Command lines as `wandb agent` makes them load; each run of a sweep has a folder of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_trainer.config.loading import dump_config
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.run.configure import load_config
from tests.unit.config.refusals import refused

ROOT = Path(__file__).parents[3]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def agents_words(sweep: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    """What the agent runs, without `/usr/bin/env python -m dist_trainer.train`; a slow test holds it to W&B's own code, which
    takes seconds to import."""
    assert sweep["command"][:4] == ["${env}", "${interpreter}", "-m", "dist_trainer.train"]
    words: list[str] = []
    for word in sweep["command"][4:]:
        words += [f"--{name}={value}" for name, value in parameters.items()] if word == "${args}" else [word]
    return words


@pytest.mark.slow
def test_these_are_the_words_of_w_and_b_s_own_code() -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(SWEEPS[0].read_text())
    parameters = {"a.b": 1e-05, "c": None, "d": False, "e": [0.9, 0.99], "f": {"g": None, "h": [True, "x"]}, "i": "two words"}
    theirs = create_sweep_command_args({"args": {name: {"value": value} for name, value in parameters.items()}})["args"]
    command = create_sweep_command(sweep["command"])
    assert command[-1] == "${args}"
    assert [*command[4:-1], *theirs] == agents_words(sweep, parameters)


def drawn(parameter: dict[str, Any], chance: random.Random) -> Any:
    """A value as W&B's server may choose it."""
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return chance.choice(parameter["values"])
    value = chance.uniform(parameter["min"], parameter["max"])
    return round(value) if parameter["distribution"].startswith("q_") else value


def given(config: TrainingConfig, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_the_example_sweeps_make_command_lines_that_load(path: Path, monkeypatch) -> None:
    sweep = yaml.safe_load(path.read_text())
    chance = random.Random(0)
    folders = set()
    for number in range(4):
        monkeypatch.setenv("WANDB_SWEEP_ID", "1a2b3c4d")
        monkeypatch.setenv("WANDB_RUN_ID", f"run{number:05d}")
        parameters = {name: drawn(parameter, chance) for name, parameter in sweep["parameters"].items()}
        config = load_config(agents_words(sweep, parameters))
        for name, value in parameters.items():
            assert given(config, name) == (tuple(value) if isinstance(value, list) else value), name
        assert config.tracking.wandb == "online"
        folders.add(config.run_name)
    assert folders == {f"lr-run{number:05d}" for number in range(4)}
    assert sweep["metric"] == {"name": "validation/best_loss", "goal": "minimize"}, "which wandb_sink logs"


def test_nested_parameters_come_as_a_dictionary() -> None:
    parameters = {
        "optim": {"learning_rate": 1e-05, "betas": [0.9, 0.99]},
        "model": {"head_dim": None, "tie_word_embeddings": False, "name": "decoder_lm"},
    }
    words = agents_words({"command": ["${env}", "${interpreter}", "-m", "dist_trainer.train", "${args}"]}, parameters)
    assert words[0] == "--optim={'learning_rate': 1e-05, 'betas': [0.9, 0.99]}", "as Python writes it"
    config = load_config(words)
    assert (config.optim.learning_rate, config.optim.betas) == (1e-05, (0.9, 0.99))
    assert (config.model.head_dim, config.model.tie_word_embeddings) == (None, False)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--optim={'lr': 0.1}", "command line: optim.lr: no such key; did you mean optim.learning_rate?"),
        ("--optim={", "optim: is a section; set its keys, such as optim.name"),
        ("--optim.betas=None", "optim.betas: 'None' is not a list of 2 numbers"),
    ],
)
def test_a_sweep_over_an_unknown_key_is_reported(word: str, told: str) -> None:
    assert told in refused(word)


def test_a_preempted_run_of_a_sweep_finds_its_folder_again(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert load_config(["--run_name", "x"]).run_name == "x", "no sweep"
    monkeypatch.setenv("WANDB_SWEEP_ID", "1a2b3c4d")
    config = load_config(["--run_name", "x"])
    assert config.run_name == "x-abc123"
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(["--config", str(tmp_path / "config.yaml")]).run_name == "x-abc123"


def test_a_preempted_run_of_a_sweep_may_have_lost_the_model_it_started_from(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    monkeypatch.setenv("WANDB_SWEEP_ID", "1a2b3c4d")
    (tmp_path / "x-abc123/checkpoints/step-00000001").mkdir(parents=True)
    saved = "model: {name: hf, init_from: ./gone}\ndata: {tokenizer: ./gone}\n"
    (tmp_path / "x-abc123/config.yaml").write_text(saved)
    words = ["--output_dir", str(tmp_path), "--run_name", "x", "--model.name", "hf", "--model.init_from", "./gone"]
    assert load_config(words).data.tokenizer == "./gone"
