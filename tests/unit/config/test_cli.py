"""The words of the command: help that a person can read, and wrong uses that each end in a sentence."""

from __future__ import annotations

import pkgutil
import re
import sys
import tomllib
from pathlib import Path

import pytest

from dist_trainer.config.command_line import CONSOLE_SCRIPT, MODULE, pop_dry_run, program
from dist_trainer.config.help import MAX_WIDTH, help_text
from dist_trainer.config.keys import descriptions, key_types, section_names
from dist_trainer.config.presets import PRESETS
from dist_trainer.run.configure import load_config
from dist_trainer.train import main
from tests.unit.config.refusals import refused


def shown(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        load_config(argv)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_console_script_is_the_command(capsys, monkeypatch):
    scripts = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {CONSOLE_SCRIPT}
    monkeypatch.setattr(sys, "argv", [CONSOLE_SCRIPT, "--version"])
    monkeypatch.setattr("atexit.register", lambda handler: None)  # this process goes on
    with pytest.raises(SystemExit) as stopped:
        pkgutil.resolve_name(scripts[CONSOLE_SCRIPT])()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("dist_trainer ")


def options_in(text: str) -> set[str]:
    return set(re.findall(r"^  --([\w.]+)", text, re.MULTILINE))


def test_the_template_in_the_help_works_when_typed_in_a_shell(tmp_path):
    [example] = re.findall(r'"(.*?)"', descriptions()["data.template"])
    assert example == r"{context}\n{question}"
    assert load_config(["--data.template", example]).data.template == "{context}\n{question}"
    assert load_config([r"--data.completion_template=\t{a}\\n\d"]).data.completion_template == "\t{a}\\n\\d"
    (tmp_path / "mine.yaml").write_text("data:\n  template: '{a}\\n'\n  completion_template: \"{a}\\n\"\n")
    of_file = load_config(["--config", str(tmp_path / "mine.yaml")]).data
    assert (of_file.template, of_file.completion_template) == ("{a}\\n", "{a}\n"), "as YAML reads them"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(MAX_WIDTH + 10))


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_first_screen_names_examples_sizes_sections_and_what_is_used_most(capsys, word):
    said = shown(capsys, word)
    assert len(said.splitlines()) <= 60
    assert all(len(line) <= MAX_WIDTH for line in said.splitlines())
    assert all(f"{name} (" in " ".join(said.split()) for name in PRESETS)
    assert all(re.search(rf"\b{name}\b", said) for name in section_names())
    assert {"run_name", "data.dataset", "optim.learning_rate", "train.max_steps"} <= options_in(said)
    others = {"config", "preset", "dry_run", "print_config", "print_completion", "version", "help"}
    assert options_in(said) - others <= key_types().keys()
    assert others <= options_in(said)


def test_help_on_all_lists_every_key_and_help_on_a_section_those_of_it(capsys):
    said = shown(capsys, "--help", "all")
    assert options_in(said) == key_types().keys()
    assert all(len(line) <= MAX_WIDTH for line in said.splitlines())
    optim = {key for key in key_types() if key.startswith("optim.")}
    assert options_in(shown(capsys, "--help", "optim")) == options_in(shown(capsys, "-h", "--optim.")) == optim
    assert "--precision.compile true|false|auto (auto)" in shown(capsys, "--help", "precision")


def test_help_fits_into_a_narrower_terminal_except_for_its_commands(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    screen = shown(capsys, "--help")
    keys_and_options = screen[screen.index("most-used keys") : screen.index("\nmore\n")]
    assert all(len(line) <= 60 for line in (keys_and_options + shown(capsys, "--help", "all")).splitlines())
    assert "--model.init_from HuggingFaceTB/SmolLM2-135M \\\n" in screen, "a command can still be pasted"


def test_help_is_bold_on_a_terminal_alone_and_never_with_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[1m" in help_text("", "dist-train", coloured=True)
    assert "\033" not in help_text("", "dist-train")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in help_text("all", "dist-train", coloured=True)


def test_the_examples_of_the_first_screen_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = help_text("", "dist-train").replace("\\\n", " ")
    examples = [line.split()[1:] for line in said.splitlines() if line.startswith("    dist-train")]
    assert len(examples) == 5
    for words in examples:
        kept = [word for word in pop_dry_run(words)[0] if word not in ("--print_config", ">", "mine.yaml")]
        if "--model.init_from" not in kept:  # which would be asked for on the Hub
            assert load_config(kept)


def test_the_command_calls_itself_as_it_was_called(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dist-train"])
    assert program() == CONSOLE_SCRIPT
    assert "\n  dist-train [--config FILE]" in shown(capsys, "--help")
    monkeypatch.setattr(sys, "argv", ["/somewhere/dist_trainer/train.py"])
    assert program() == MODULE


REFUSED = {
    "--preset nope": "command line: unknown preset 'nope'; choose from 1m, 10m, 30m, 124m, 350m, 1b",
    "--preset": "command line: --preset needs a name: 1m, 10m",
    "--preset 1m --preset 10m": "command line: --preset given twice (1m, 10m)",
    "--preset 1m --model.init_from runs": "--preset 1m is for training from scratch, but model.init_from (runs) determines",
    "--preset 10m --model.hidden_size 100": "model.num_attention_heads: model.hidden_size (100) is not divisible by 6",
    "--preset 1m --batch.micro_batch_size 24": "preset 1m: batch.global_batch_size: 64 must be a multiple of",
    "--print_config=yes": "command line: --print_config takes no value",
    "--dry_run=true": "command line: --dry_run takes no value",
    "--dry_run true": "command line: unexpected argument 'true'",
    "--help nope": "command line: --help: unknown section 'nope'; choose from model, data,",
    "--print_completion tcsh": "command line: --print_completion: 'tcsh' is not one of bash, zsh, fish",
    "--print_completion": "command line: --print_completion needs one of bash, zsh, fish",
    "--presets 1m": "command line: presets: no such key",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_wrong_use_is_rejected_in_one_sentence(words):
    message = refused(*pop_dry_run(words.split())[0])
    assert REFUSED[words] in message
    assert "\n" not in message


def test_the_command_itself_reports_it_and_exits_with_2(capsys):
    assert main(["--dry_run", "--preset", "nope"]) == 2
    assert capsys.readouterr().err.startswith("dist_trainer: command line: unknown preset 'nope'")
